"""`qualify`: is this accelerator, and this machine, right? One command, one page, one verdict.

    command.py    the flags, the stages in turn, the files and the exit code
    stages.py     which stages there are, what each one asks, and its time limit
    runner.py     runs a stage in a process of its own, which may crash or hang
    workers.py    starts the ranks of a measurement, and collects what each one found
    workload.py   BERT-large's update on a rank, as `train` builds it
    measuring.py  updates that are timed, and what the ranks' times tell
    other_programs.py    what other programs use of the CPUs, and whether a late stage was slow
    probes.py     what a rank measures of its device, its memory and its links
    sensors.py    power, temperature and clocks, where they can be read
    record.py     verdicts, the result of a stage and of the whole, as JSON
    page.py       the page: pictures.py and roofline.py draw, tables.py has the figures
    normal.py     a measured speed beside those of published.py and published.toml
    terminal.py   what is shown while it runs
    context.py    what every stage is told: device, ranks, model, limits

Each stage is one module of this package with a function `run(context, tell) -> Finding`.
"""
