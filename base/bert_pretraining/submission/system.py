"""A system description, MLPerf's systems/NAME.json, filled from this machine."""

from __future__ import annotations

FIELDS = (
    "submitter division status system_name number_of_nodes host_processors_per_node "
    "host_processor_model_name host_processor_core_count host_processor_vcpu_count "
    "host_processor_frequency host_processor_caches host_processor_interconnect "
    "host_memory_capacity host_storage_type host_storage_capacity host_networking "
    "host_networking_topology host_memory_configuration accelerators_per_node "
    "accelerator_model_name accelerator_host_interconnect accelerator_frequency "
    "accelerator_on-chip_memories accelerator_memory_configuration "
    "accelerator_memory_capacity accelerator_interconnect accelerator_interconnect_topology "
    "cooling hw_notes framework other_software_stack operating_system sw_notes"
).split()
# The others may stay blank, as published descriptions show.
NEEDED_FIELDS = (
    "submitter division status system_name number_of_nodes host_processors_per_node "
    "host_processor_model_name accelerators_per_node framework operating_system"
).split()
# submission_status in the logs -> status in the description, from ruleset 4.0.0 on.
STATUS_IN_DESCRIPTION = {
    "onprem": "Available on-premise",
    "cloud": "Available cloud",
    "preview": "Preview",
    "research": "Research, Development, or Internal (RDI)",
}
