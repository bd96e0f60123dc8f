"""The command `plan`, by what it prints."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from bert_pretraining import config
from bert_pretraining.config import Config
from bert_pretraining.config.settings import FIELDS
from bert_pretraining.qualify import published
from bert_pretraining.scaling.inputs import USED
from helpers import ROOT, in_process

H200 = ("plan", "--name", "nvidia", "--config", "H200x1x8")
MINI = ("plan", "--name", "mini", "--config", "CPUx1x2", "--bert_config_path")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command from the checkout's root."""
    return in_process(*arguments, cwd=ROOT)


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "bert_config.json"
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    others = {"vocab_size": 100, "intermediate_size": 128, "max_position_embeddings": 64}
    path.write_text(json.dumps(sizes | others))
    return str(path)


def step_file(tmp_path: Path, batch: int, seconds: float, **changes: object) -> str:
    times = {"seconds": {"median": seconds}, "peak_memory_mib": batch}
    slower = {"seconds": {"median": 2 * seconds}}
    content = {
        "layers": 2, "hidden_size": 64, "lengths": [64] * batch, "device": "CPU",
        "results": {"fp32": {"slow": slower, "auto": times, "lost": {"failed": "x"}}},
    }  # fmt: skip
    path = tmp_path / f"step_{batch}.json"
    path.write_text(json.dumps(content | changes))
    return str(path)


def qualification_file(tmp_path: Path, **settings: object) -> str:
    figures = {"all_reduce": {"1": {"bus_gb/s": 1.0}, "16": {"bus_gb/s": 2.0}}}
    figures["all_reduce_latency_seconds"] = 60e-6
    path = tmp_path / "qualification.json"
    stages = [{"name": "limits", "figures": figures}]
    one = {"seconds_forward_backward": 0.005, "seconds_optimizer": 0.002}
    measured = {"layers": 2, "precision": "fp32", "by_batch_size": {"8": one}}
    # The stage measures BERT-large's width alone.
    stages += [{"name": "step", "figures": measured}] if settings else []
    content = {"stages": stages, "settings": {"ranks": 4, **settings}}
    path.write_text(json.dumps(content))
    return str(path)


def test_a_plan_from_measured_parts(tmp_path: Path, model: str) -> None:
    files = [step_file(tmp_path, 8, 0.005), step_file(tmp_path, 32, 0.017)]
    files.append(qualification_file(tmp_path))
    done = command(*MINI, model, "--ranks", "2", "--measured", *files, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    values = {one["name"]: (one["value"], one["source"]) for one in plan["inputs"]}
    assert values["fixed part of a micro-batch"][0] == "1.00 ms"
    assert values["each sequence"][0] == "0.50 ms"
    assert values["each sequence"][1] == f"measured in {files[0]}, {files[1]} (auto, CPU)"
    assert values["optimizer, all parameters"] == ("0.00 ms", "not known, counted as 0")
    assert values["bandwidth inside"][0] == "2 GB/s"
    assert values["latency inside"][0] == "10.0 us"  # 60 us are the 6 hops of 4 ranks
    assert values["activations of 32"][0] == "0.0312 GiB"  # 1 MiB a sequence
    one, two = plan["by_ranks"]
    assert one["step_seconds"] == pytest.approx(1e-3 + 32 * 0.5e-3)
    assert two["exchange_seconds"] == pytest.approx(
        2 * 10e-6 + two["memory_bytes"]["gradients"] / 2e9
    )
    assert two["efficiency_of_one_rank"] == pytest.approx(one["step_seconds"] / two["step_seconds"])
    assert two["efficiency_of_machine"] == pytest.approx(1.0)
    assert two["to_target"] is None
    assert any("reference points are of BERT-large alone" in note for note in plan["notes"])


def test_one_batch_size_leaves_the_fixed_part_unknown(tmp_path: Path, model: str) -> None:
    file = step_file(tmp_path, 8, 0.005)
    done = command(*MINI, model, "--ranks", "2", "--measured", file, "--bandwidth", "1",
                   "--train_batch_size", "4")  # fmt: skip
    assert re.search(r"fixed part of a micro-batch +0.00 ms +not known, counted as 0", done.stdout)
    text = " ".join(done.stdout.split())
    assert "the fixed part of a step is not known; measure another batch size" in text
    assert "launches may dominate with a batch a rank as small as 4 (from 1 rank on)." in text
    assert re.search(r"bandwidth inside +1 GB/s +as between machines", done.stdout)


def notes_of(*files: str, model: str, ranks: int = 2) -> list[str]:
    done = command(
        *MINI, model, "--ranks", str(ranks), "--bandwidth", "1", "--json", "--measured", *files
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["notes"]


def test_what_bends_the_line_is_told(tmp_path: Path, model: str) -> None:
    small, large = step_file(tmp_path, 8, 0.005), step_file(tmp_path, 32, 0.017)
    line = "the line goes through 8, 32 sequences, and no third size checks it"
    assert line in notes_of(small, large, model=model)
    other = {"fp32": {"graph": {"seconds": {"median": 0.01}}}}
    several = notes_of(small, step_file(tmp_path, 16, 0.01, results=other), model=model)
    assert any(
        "of different steps (auto, CPU; graph, CPU): measure the same" in one for one in several
    )
    uneven = notes_of(small, step_file(tmp_path, 2, 0.002, lengths=[64, 36]), model=model)
    assert any("have 50 to 64 tokens on average" in one for one in uneven)
    below = notes_of(small, step_file(tmp_path, 16, 0.02), model=model)
    assert any("would begin below 0: it goes through 0, off by at most" in one for one in below)


def test_ranks_that_do_not_fill_machines_are_told(tmp_path: Path, model: str) -> None:
    file = step_file(tmp_path, 8, 0.005)
    told = (
        "7 ranks do not fill machines of 2: computed as if the last one were full; a real run "
        "needs the same number of ranks on every machine"
    )
    assert told in notes_of(file, model=model, ranks=7)
    for ranks in (1, 8):
        assert not any("do not fill" in one for one in notes_of(file, model=model, ranks=ranks))


def test_what_several_ranks_measured_is_not_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "bert_config.json"
    sizes = {"hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16}
    others = {"vocab_size": 100, "intermediate_size": 128, "max_position_embeddings": 64}
    path.write_text(json.dumps(sizes | others))
    for is_sharded in (False, True):
        file = qualification_file(tmp_path, distributed_lamb=is_sharded)
        done = command(*MINI, str(path), "--ranks", "2", "--measured", file, "--json")
        assert done.returncode == 0, done.stderr
        plan = json.loads(done.stdout)
        values = {one["name"]: one["value"] for one in plan["inputs"]}
        assert values["optimizer, all parameters"] == ("0.00 ms" if is_sharded else "2.00 ms")
        left_out = [one for one in plan["notes"] if "its optimizer's time is left out" in one]
        assert len(left_out) == is_sharded
        assert any("measured on 4 ranks, so forward and backward" in one for one in plan["notes"])


def test_files_of_several_devices_are_refused(tmp_path: Path, model: str) -> None:
    files = [step_file(tmp_path, 8, 0.005), step_file(tmp_path, 32, 0.017, device="another")]
    done = command(*MINI, model, "--ranks", "2", "--measured", *files)
    assert done.returncode == 2
    told = f"measured on several devices: {files[0]} on CPU, {files[1]} on another; pass those"
    assert told in done.stderr


def test_a_plan_of_a_published_device() -> None:
    done = command(*H200, "--device", "H100", "--ranks", "4096")
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
    assert "BERT-large, the default" in done.stdout
    assert "in fp8; configured is bf16" in done.stdout
    assert "RCPs of ruleset 4.1.0 are at global batches of 448, 4,608," in done.stdout
    assert re.search(r"More ranks pay up to \d+: of the ranks added to reach", done.stdout)
    assert re.search(r"\n *4,096 +4 +16,384 ", done.stdout)  # the largest RCP
    text = " ".join(done.stdout.split())
    assert "ring (auto, as the optimizer is sharded)" in text
    shortens = r"would shorten a step from [\d,.]+ to [\d,.]+ ms"
    assert re.search(
        rf"At 4,096 ranks, --exchange hierarchical {shortens} \(from 32 ranks on\)\.", text
    )
    assert re.search(
        rf"At 4,096 ranks, --distributed_lamb false {shortens}, if memory allows it \(from", text
    )
    assert re.search(
        r"At 4,096 ranks, a graph over the whole update would save up to [\d.]+ of a step's", text
    )
    in_two = command(
        *H200, "--device", "H100", "--ranks", "4096", "--exchange", "hierarchical", "--json"
    )
    ring = command(*H200, "--device", "H100", "--ranks", "4096", "--json")
    seconds = [json.loads(one.stdout)["by_ranks"][-1]["step_seconds"] for one in (in_two, ring)]
    assert seconds[0] < seconds[1] / 2


def test_a_small_optimizer_and_small_links_are_advised_only_where_they_apply() -> None:
    flags = (*H200, "--device", "H100", "--ranks", "8")
    assert "What would help" not in command(*flags).stdout
    slow = command(*flags, "--inside_bandwidth", "1").stdout
    assert "ms, in which it waits for the exchange" in " ".join(slow.split())
    whole = ("--distributed_lamb", "false", "--train_batch_size", "4")
    replicated = " ".join(command(*flags, *whole).stdout.split())
    assert re.search(
        r"At 8 ranks, --distributed_lamb would shorten a step from [\d.]+ to [\d.]+ ms \(from 2",
        replicated,
    )
    assert "--distributed_lamb would" not in command(*flags, *whole, "--optimizer", "adamw").stdout
    # Where a sharded step is the slower one, no rank is told to shard.
    far = json.loads(command(*flags[:-1], "512", *whole, "--json").stdout)["by_ranks"]
    assert [any("--distributed_lamb would" in one for one in row["advice"]) for row in far] == [
        1 < row["ranks"] <= 8 for row in far
    ]
    tree = command(*flags, *whole, "--exchange", "tree").stdout
    assert "At 8 ranks, --distributed_lamb --exchange ring would" in " ".join(tree.split())
    switches = command(*flags[:-1], "512", *whole, "--exchange", "in_network").stdout
    assert not re.search("--exchange (hier|in_)", switches)


def test_without_mlperf_logging_only_the_time_to_the_target_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    done = command(*H200, "--device", "H100", "--ranks", "2")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "no time to the target:" in text
    assert "lacks the package mlperf_logging" in text
    assert "Batch sizes at" not in text


def test_flags_without_effect_are_told(tmp_path: Path, model: str) -> None:
    file = step_file(tmp_path, 8, 0.005)
    links = ("--bandwidth", "1", "--inside_bandwidth", "2", "--latency", "3")

    def notes(*flags: str) -> list[str]:
        done = command(*MINI, model, "--measured", file, *flags, "--json")
        assert done.returncode == 0, done.stderr
        return [one for one in json.loads(done.stdout)["notes"] if "without effect" in one]

    told = "without effect on this plan: "
    given = ("--seed", "3", "--train_batch_size", "4", "--output_dir", "out")
    (line,) = notes("--ranks", "4", *links, *given)
    assert line.startswith(told) and set(line.removeprefix(told).split(", ")) == {
        "--seed", "--output_dir"
    }  # fmt: skip
    assert notes("--ranks", "4", *links) == []
    assert notes("--ranks", "2", "--bandwidth", "1") == []  # it counts inside of a machine too
    assert notes("--ranks", "2", *links) == [f"{told}--bandwidth, --latency"]
    one_each = ("--nproc_per_node", "1", "--inside_latency", "1")
    assert notes("--ranks", "2", "--bandwidth", "1", *one_each) == [f"{told}--inside_latency"]
    h100 = (*H200, "--device", "H100", "--ranks", "1", "--nproc_per_node", "1", "--json")
    given = ("--num_eval_examples", "100", "--spread", "3", "--eval_batch_size", "7")
    (line,) = [one for one in json.loads(command(*h100, *given).stdout)["notes"] if told in one]
    assert line == f"{told}--eval_batch_size, --num_eval_examples"  # they have evaluations in
    alone = ("--exchange", "tree", "--spread", "3", "--bandwidth", "1")
    assert notes("--ranks", "1", *one_each, *alone) == [
        f"{told}--bandwidth, --inside_latency, --exchange, --spread"
    ]
    done = command(*H200, "--device", "H100", "--ranks", "4", "--bandwidth", "40")
    assert f"Note: {told}--bandwidth\n" in done.stdout  # the device tells that of a machine


def test_the_settings_that_a_plan_uses_are_those_that_it_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    read: set[str] = set()

    def recorded(self: Config, name: str) -> object:
        if name in FIELDS:
            read.add(name)
        return object.__getattribute__(self, name)

    file = step_file(tmp_path, 8, 0.005)
    flags = ("--ranks", "2", "--measured", file, "--bandwidth", "1", "--precision", "fp32")
    resolved_configs = []
    real = config.resolve

    def resolve(values: dict) -> config.Resolved:
        resolved_configs.append(real(values))
        monkeypatch.setattr(Config, "__getattribute__", recorded)
        return resolved_configs[-1]

    for optimizer in ("auto", "adamw"):
        with monkeypatch.context() as patch:
            patch.setattr(config, "resolve", resolve)
            done = command(*MINI, model, *flags, "--optimizer", optimizer)
        monkeypatch.undo()
        assert done.returncode == 0, done.stderr
    # A plan takes the model's file in place of the data's here, and says the configuration's name.
    assert read | {"name", "config", "data_dir", "fp16"} == USED


def test_the_spread_of_the_ranks_is_in_the_table(tmp_path: Path, model: str) -> None:
    flags = (*MINI, model, "--measured", step_file(tmp_path, 8, 0.005), "--bandwidth", "1")
    without = command(*flags, "--ranks", "4").stdout
    assert "Wait" not in without
    assert re.search(r"spread of the ranks +0% +default: no rank waits", without)
    done = command(*flags, "--ranks", "4", "--spread", "5")
    assert re.search(r"\n +4 +32 +128 +\S+ +20\.0 +4\.\d% ", done.stdout)
    assert "Wait: for the slowest rank, as a share of the step." in " ".join(done.stdout.split())
    plan = json.loads(command(*flags, "--ranks", "4", "--spread", "5", "--json").stdout)
    assert plan["spread"] == 0.05
    assert plan["by_ranks"][-1]["waiting_seconds"] == pytest.approx(0.02 * 0.05 * 1.02938, rel=1e-4)


def test_a_qualification_of_fewer_layers_is_refused_with_the_way_out(tmp_path: Path) -> None:
    qualified = qualification_file(tmp_path, num_layers=2)
    done = command(*H200, "--ranks", "4", "--precision", "fp32", "--measured", qualified)
    assert done.returncode == 2
    assert done.stderr.endswith(
        "of 2 layers of 1024, but this model has 24 of 1024; pass one of 'python -m "
        "bert_pretraining qualify --num_layers 24' (by default it takes 24 on an accelerator, 2 "
        "on a CPU)\n"
    )


def test_the_table_of_published_results_is_that_of_the_page() -> None:
    done = command("plan", "--published")
    assert done.returncode == 0, done.stderr
    table, _, made = done.stdout.strip().partition("\n\n")
    page = (ROOT / "docs/scaling.md").read_text()
    assert table in page and made in page
    assert made.startswith("Made with --spread 0:")
    found = json.loads(command("plan", "--published", "--json").stdout)
    assert {(one["device"], one["ranks"]) for one in found} >= {
        ("H100 SXM", 8), ("H100 SXM", 64), ("H100 SXM", 3472), ("GB200", 64), ("GB200", 512)
    }  # fmt: skip
    for one in found:  # nothing above one machine went into a fit
        assert one["ranks"] <= 8 or not one["is_in_fit_to_4_and_8"]
        assert one["ranks"] == 8 or not one["is_in_fit_to_8"]
    assert len(published.rows()) > len(found)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ranks", "0"], "--ranks 0: it must be from 1 to 65,536"),
        (["--ranks", "x"], "invalid int value: 'x'"),
        ([], "--ranks is missing"),
        (["--ranks", "4", "--spread", "-1"], "--spread -1: it must be from 0 to 100 percent"),
        (["--ranks", "4", "--spread", "nan"], "--spread nan: it must be from 0 to 100 percent"),
        (["--published"], "leave out --name, --config, or leave out --published"),
        (["--published", "--ranks", "4", "--bandwidth", "3", "--seed", "5"],
         "--published takes no --ranks: its table is of published results alone; leave out"
         " --ranks, --bandwidth,"),
        (["--ranks", "4", "--bandwidth", "0"], "--bandwidth 0: it must be above 0"),
        (["--ranks", "4", "--bandwidth", "fast"], "invalid float value: 'fast'"),
        (["--ranks", "4", "--latency", "nan"], "--latency nan: it must be above 0"),
        (["--ranks", "4", "--nnodes", "2"], "--nnodes 2: the number of machines follows from"),
        (["--ranks", "4", "--device", "H100", "--exchange", "in_network"],
         "--exchange in_network: with distributed_lamb, ranks reduce-scatter"),
        (["--ranks", "4", "--device", "H100", "--optimizer", "adamw"],
         "--optimizer adamw cannot shard its state"),
        (["--ranks", "4"], "nothing tells how long one rank takes"),
        (["--ranks", "4", "--device", "L4"], "--device L4: no published result of one machine"),
        (["--ranks", "4", "--config", "none.toml"], "none.toml: does not exist"),
        (["--ranks", "4", "--ruleset", "6.0.0"], "nothing tells how long one rank takes"),
        (["--ranks", "4", "--device", "H100", "--ruleset", "6.0.0"], "BERT left MLPerf Training"),
        (["--ranks", "4", "--measured", "none.json"], "none.json: does not exist"),
        (["--ranks", "4", "--device", "H100", "--bert_config_path", "MODEL"],
         "published results are of BERT-large"),
        (["--ranks", "4", "--bert_config_path", "MODEL", "--measured", "STEP"],
         "measured in fp32, not in bf16"),
        (["--ranks", "4", "--measured", "STEP"], "of 2 layers of 64, but this model has 24 of"),
        (["--ranks", "4", "--bert_config_path", "MODEL", "--precision", "fp32", "--measured",
          "STEP"], "nothing tells how fast the ranks' links are"),
        (["--ranks", "16", "--bert_config_path", "MODEL", "--precision", "fp32", "--measured",
          "STEP", "--inside_bandwidth", "1"], "16 take several machines of 8 ranks"),
    ],
)  # fmt: skip
def test_errors_are_one_line(tmp_path: Path, model: str, flags: list[str], words: str) -> None:
    files = {"MODEL": model, "STEP": step_file(tmp_path, 8, 0.005)}
    done = command(*H200, *(files.get(flag, flag) for flag in flags))
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not figures in JSON"),
        ("[1]", "holds no JSON object"),
        ('{"a": 1}', "has no figures of a step or an optimizer"),
        ('{"seconds": {"flat": {"median": 1}}, "parameters": 5}', "of 5 parameters, but this"),
        ('{"stages": [], "settings": {"ranks": 2}}', "no stage measured a step or an all-reduce"),
        ('{"stages": 3}', "damaged"),
        ('{"results": {"fp32": {"auto": {"seconds": {"median": -1}}}}, "lengths": [9], '
         '"layers": 2, "hidden_size": 64, "device": "CPU"}', "-1 is no number above 0"),
        ('{"results": {"fp32": {"auto": {"seconds": {"median": Infinity}}}}, "lengths": [9], '
         '"layers": 2, "hidden_size": 64, "device": "CPU"}', "inf is no number above 0"),
        ('{"results": {"fp32": {"auto": {"seconds": {"median": 1}}}}, "lengths": [], '
         '"layers": 2, "hidden_size": 64, "device": "CPU"}', "damaged (ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_told(tmp_path: Path, model: str, content: str, words: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(content)
    done = command(*MINI, model, "--ranks", "2", "--measured", str(path))
    assert done.returncode == 2
    assert f"{path}: " in done.stderr and done.stderr.count("\n") == 1
    assert words in done.stderr
