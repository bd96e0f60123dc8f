"""What N ranks would give: from the parts of one rank and the exchange to a step and a run."""
