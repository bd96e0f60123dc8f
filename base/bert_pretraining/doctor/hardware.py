"""GPUs, kernels and precisions, CPUs and how ranks are bound to them, memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bert_pretraining import topology
from bert_pretraining.config import Config
from bert_pretraining.doctor.report import NOTE, OK, PROBLEM, CheckResult
from bert_pretraining.errors import UserError
from bert_pretraining.launch import cpu_instead
from bert_pretraining.launch.plan import LaunchFlags
from bert_pretraining.model.bert_config import BERT_CONFIG_NAME, BertConfig
from bert_pretraining.runtime import packages
from bert_pretraining.runtime.words import counted

if TYPE_CHECKING:
    import torch

GIB = 2**30
USUAL_HEAD_SIZE = 64  # of every BERT that Google published
FP8_LAYERS = ((64, 256), (256, 64))  # (inputs, outputs): small ones show whether products are right


def results(
    settings: Config, flags: LaunchFlags, machine: topology.Machine, looks_at_data: bool
) -> Iterator[CheckResult]:
    """All results of this module. The checks that need PyTorch run only if it can be imported.

    looks_at_data: whether the run's data directory is known.
    """
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a missing CUDA library
        yield from _without_torch(error)
    else:
        yield from gpus(settings, machine)
        yield from kernels(settings, head_size(settings) if looks_at_data else USUAL_HEAD_SIZE)
    yield from binding(settings, flags, machine)
    yield memory()


def _without_torch(error: Exception) -> Iterator[CheckResult]:
    found = topology.find_accelerators()
    fix = "install the PyTorch of the device's vendor; for a CPU or NVIDIA's GPUs see pytorch.org"
    if packages.folder_of("torch") is not None:  # else it is a result of `software`
        yield CheckResult("PyTorch", PROBLEM, f"cannot be imported: {error}", fix)
    if found:
        yield CheckResult("device", NOTE, f"this machine has {topology.describe(found)}", fix)


def gpus(settings: Config, machine: topology.Machine) -> Iterator[CheckResult]:
    """The accelerators that PyTorch can use, compared with the machine and the configuration."""
    import torch

    from bert_pretraining.runtime import device as devices

    kind = devices.seen()
    count = 0 if kind is None else devices.count(kind)
    for index in range(count):
        node = machine.gpus[index].node if len(machine.gpus) == count else None
        where = "unknown" if node is None else node
        described = _described(torch.device(kind, index))
        yield CheckResult(f"GPU {index}", OK, f"{described}, NUMA node {where}")
    wanted = settings.nproc_per_node
    if settings.device == "cpu":
        yield CheckResult("device", OK, "cpu, as --device asks")
    elif 0 < count < wanted:
        text = f"{wanted} ranks need {wanted} GPUs, but there are {count}"
        fix = f"pass --nproc_per_node {count}, or --device cpu"
        yield CheckResult("device", PROBLEM, text, fix)
    elif count:
        yield CheckResult("device", OK, f"{counted(count, 'GPU')}, {cpu_instead.build()}")
    else:
        yield _no_gpu(settings)


def _described(device: torch.device) -> str:
    """Name, compute capability and memory, as far as PyTorch tells them."""
    from bert_pretraining.runtime import device as devices

    parts = [devices.name(device)]
    if capability := devices.capability(device):
        parts.append("capability {}.{}".format(*capability))
    if total := devices.memory(device).total:
        parts.append(f"{total / GIB:.0f} GiB")
    return ", ".join(parts)


def _no_gpu(settings: Config) -> CheckResult:
    """What a launch says, or refuses, where PyTorch sees no accelerator."""
    from bert_pretraining.runtime import device as devices

    if settings.device == "auto":
        try:
            notice = cpu_instead.notice(settings)
        except UserError as error:
            return CheckResult("device", PROBLEM, error.problem, error.fix)
        if notice is None:
            return CheckResult("device", OK, "no accelerator here: training on the CPU")
        return CheckResult("device", NOTE, notice)
    found = topology.find_accelerators()
    if not found:
        meant = devices.did_you_mean(settings.device)
        text = f"--device {settings.device}, but this machine has no accelerator{meant}"
        return CheckResult("device", PROBLEM, text, "pass --device cpu")
    build = cpu_instead.build()
    fix = cpu_instead.remedy(found, build)
    return CheckResult("device", PROBLEM, cpu_instead.unseen(found, build), fix)


def head_size(settings: Config) -> int:
    """The attention's head size of the run's model, USUAL_HEAD_SIZE if it cannot be read.

    What is wrong with bert_config.json is a result of the data's check.
    """
    default = Path(settings.data_dir or "") / BERT_CONFIG_NAME
    try:
        return BertConfig.load(Path(settings.bert_config_path or default)).head_size
    except UserError:
        return USUAL_HEAD_SIZE


def kernels(settings: Config, head_size: int = USUAL_HEAD_SIZE) -> Iterator[CheckResult]:
    """For each precision, whether it trains here and with which kernels."""
    import torch

    from bert_pretraining.kernels import DTYPES, select
    from bert_pretraining.runtime import device as devices

    kind = None if settings.device == "cpu" else devices.seen()
    on_gpu = kind is not None
    device = torch.device("cpu") if kind is None else torch.device(kind, 0)
    for precision, dtype in DTYPES.items():
        what = f"kernels {precision}"
        status, text = OK, ""
        if precision == "fp16" and not on_gpu:
            yield CheckResult(what, NOTE, "fp16 needs a GPU; a run trains in fp32 instead")
            continue
        if not devices.supports(device, dtype):
            text = f"{kind} devices do not compute in it; a run trains in fp32 instead"
            yield CheckResult(what, NOTE, text)
            continue
        if precision == "bf16" and devices.emulates_bf16(device):
            status, text = NOTE, "bf16 is emulated on this GPU, and slow: "
        try:
            chosen = select(
                settings.kernels, device, dtype, head_size, settings.kernels_by_operator
            )
        except UserError as error:
            wanted = precision == settings.resolved_precision
            yield CheckResult(what, PROBLEM if wanted else NOTE, str(error))
        else:
            yield CheckResult(what, status, text + chosen.describe())
    yield fp8(settings, device)


def fp8(settings: Config, device: torch.device) -> CheckResult:
    """Whether the device's products in fp8 are there, and right; the other kernels are as above."""
    import torch

    from bert_pretraining.kernels import fp8_engine, fp8_linear
    from bert_pretraining.runtime import device as devices

    what, refused = "kernels fp8", PROBLEM if settings.resolved_precision == "fp8" else NOTE
    has_bf16 = devices.supports(device, torch.bfloat16) and not devices.emulates_bf16(device)
    try:
        engine = fp8_engine.engine_for(device)
        if device.type != "cpu":
            fp8_linear.check(device, torch.bfloat16 if has_bf16 else torch.float16, FP8_LAYERS)
    except UserError as error:
        return CheckResult(what, refused, error.problem, error.fix)
    except RuntimeError as error:  # of a device that lacks what its capability promises
        text = " ".join(str(error).split())
        return CheckResult(
            what, refused, text, "pass --precision bf16, or mend the device's driver"
        )
    if device.type == "cpu":
        text = "a CPU has no fp8: its rounding is emulated, which is slower than bf16"
        return CheckResult(what, NOTE, text)
    return CheckResult(what, OK, f"linear layers: {engine.name}; a small layer was right")


def binding(
    settings: Config, flags: LaunchFlags, machine: topology.Machine
) -> Iterator[CheckResult]:
    """Which CPUs each rank of this machine gets, and how it is bound to them."""
    use_gpus = settings.device != "cpu"
    bindings = topology.place_ranks(machine, settings.nproc_per_node, use_gpus, flags.hyper_threads)
    fault = topology.numactl_fault(bindings)
    if fault is None:
        yield CheckResult("numactl", OK, "binds ranks to cores and memory")
    else:
        status = PROBLEM if flags.bind == "required" else NOTE
        fix = "install numactl; in a container add --cap-add SYS_NICE; or leave it as it is"
        yield CheckResult(
            "numactl", status, f"{fault}: ranks are bound by CPU affinity instead", fix
        )
    num_cores = len(machine.cores)
    threads = sum(len(core.threads) for core in machine.cores)
    text = f"{counted(num_cores, 'core')}, {counted(threads, 'hardware thread')}, "
    text += counted(len(machine.nodes), "NUMA node")
    if machine.cpu_quota is not None:
        text += f", but a quota of {machine.cpu_quota:g} CPUs"
    if settings.nproc_per_node > num_cores:
        text += f", for {counted(settings.nproc_per_node, 'rank')}: ranks share cores"
        fix = f"pass --nproc_per_node {num_cores} or less for full speed"
        yield CheckResult("CPUs", NOTE, text, fix)
    else:
        yield CheckResult("CPUs", OK, text)
    first_rank = flags.node_rank * settings.nproc_per_node
    binder = "numactl" if fault is None else "affinity"
    chosen = "none" if flags.bind == "none" else binder
    yield CheckResult("NUMA map", OK, topology.table(bindings, first_rank, chosen))


def memory() -> CheckResult:
    """How much main memory is free now."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return CheckResult("memory", NOTE, "unknown: this system has no /proc/meminfo")
    fields = dict(line.split(":", 1) for line in lines)
    total, free = (int(fields[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    status = NOTE if free < 2 else OK
    fix = "end other programs, or use fewer ranks" if free < 2 else ""
    return CheckResult("memory", status, f"{free:.1f} of {total:.1f} GiB available", fix)
