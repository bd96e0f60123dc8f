"""Models and runs whose encoder computes in fp8: which layers, state, devices, resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bert_pretraining.errors import UserError
from bert_pretraining.kernels.fp8 import Fp8State
from bert_pretraining.kernels.fp8_casts import GRADIENT
from bert_pretraining.model.layer_form import PLAIN, FusedForm
from bert_pretraining.model.parameter_memory import OwnGradients
from bert_pretraining.runtime import device as devices
from bert_pretraining.training.micro_step import MicroStep, forward_backward
from bert_pretraining.training.static_batch import Budget
from helpers import in_process, make_model, packed, padded_arrays, perf_events, tiny_config
from reference_pairs import PAIRS

CPU = torch.device("cpu")
FLAGS = ("--name", "mini", "--config", "CPUx1x1", "--device", "cpu", "--seed", 5, "--log_freq", 1,
         "--train_batch_size", 8, "--num_eval_examples", 64, "--eval_steps", 100)  # fmt: skip


def test_only_the_encoder_computes_in_fp8() -> None:
    model = make_model(tiny_config(num_hidden_layers=3))
    state = Fp8State.of(model.bert.encoder, CPU)
    assert len(state.names) == 3 * 4
    assert model.cls.predictions.transform.scaling is None
    batch = packed(padded_arrays([9, 16, 3], 16, 101))
    in_fp8 = model(batch)["mlm"].loss.item()
    for layer in model.bert.encoder.modules():
        if hasattr(layer, "scaling"):
            layer.scaling = None
    plain = model(batch)["mlm"].loss.item()
    assert in_fp8 != plain
    assert in_fp8 == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("recompute", [False, True])
def test_fused_layers_are_the_modules_in_fp8_too(recompute: bool) -> None:
    """In float64, so that no other rounding can push a number over an edge of fp8's."""
    model = make_model(tiny_config(), dtype=torch.float64)
    model.bert.encoder.checkpoint_activations = recompute
    batches = [packed(padded_arrays([9, 16, 3], 16, 101, seed=seed)) for seed in (1, 2)]
    weights = {"mlm": torch.tensor(0.01), "nsp": torch.tensor(0.2)}
    results = []
    for fuses in (False, True):
        state = Fp8State.of(model.bert.encoder, CPU)
        layers = model.bert.encoder.layer
        form = FusedForm(layers, PAIRS, OwnGradients()) if fuses else PLAIN
        model.zero_grad()
        with model.layers_as(form):
            for batch in batches:  # measured, then delayed
                sums = forward_backward(model, batch, weights)
                state.update()
            before = state.table.clone()
            with torch.no_grad():
                model(batches[0])
        assert torch.equal(state.table, before), "an evaluation moved the maxima"
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        results.append((sums, gradients, state.table))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


def test_state_is_restored_bit_for_bit_and_only_for_the_same_layers() -> None:
    state = Fp8State(["layer"], CPU)
    state["layer"].cast(torch.randn(4, 4), GRADIENT, record=True)
    state.update()
    saved = state.state_dict()
    other = Fp8State(["layer"], CPU)
    other.load_state_dict(saved)
    assert other.calibrated
    assert torch.equal(other.table, state.table)
    with pytest.raises(UserError, match="of another model"):
        Fp8State(["one", "two"], CPU).load_state_dict(saved)


@pytest.mark.parametrize("capability", [(8, 0), (7, 5), None])
def test_devices_without_fp8_are_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(devices, "capability", lambda device: capability)
    monkeypatch.setattr(devices, "name", lambda device: "An accelerator")
    with pytest.raises(UserError, match="An accelerator has") as error:
        Fp8State(["layer"], torch.device("cuda"))
    assert "--precision bf16" in error.value.fix


def test_a_resumed_run_in_fp8_is_the_uninterrupted_one(mini_data: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, "--data_dir", mini_data, "--precision", "fp8", "--max_steps", 4,
             "--gradient_accumulation_steps", 2)  # fmt: skip
    keep = ("--save_checkpoint", "--min_samples_to_start_checkpoints", 0,
            "--num_samples_per_checkpoint", 32)  # fmt: skip
    whole = in_process("train", *flags, *keep, "--output_dir", tmp_path / "whole", cwd=tmp_path)
    assert whole.returncode == 3, whole.stderr
    assert "emulated" in whole.stdout
    (made,) = (tmp_path / "whole").glob("run-*/model.ckpt-2.pt")
    scales = torch.load(made, weights_only=True)["state"]["fp8"][0]["scales"]
    assert (scales != 1.0).all()
    resumed = in_process(
        "train", *flags, "--output_dir", tmp_path / "resumed", "--init_checkpoint", made,
        cwd=tmp_path,
    )  # fmt: skip
    assert resumed.returncode == 3, resumed.stderr
    assert "not bit-identical" not in resumed.stdout

    def steps(output: str) -> list[tuple]:
        return [
            (event["global_steps"], event["loss"], event["grad_norm"])
            for event in perf_events(output, "STEP_END")
        ]

    assert steps(resumed.stdout) == steps(whole.stdout)[2:]


def test_a_run_in_bf16_goes_on_in_fp8(mini_data: Path, tmp_path: Path) -> None:
    """It has no scales to restore, and measures."""
    flags = (*FLAGS, "--data_dir", mini_data, "--save_checkpoint",
             "--min_samples_to_start_checkpoints", 0, "--num_samples_per_checkpoint", 8,
             "--output_dir", tmp_path / "output")  # fmt: skip
    first = in_process("train", *flags, "--precision", "bf16", "--max_steps", 1, cwd=tmp_path)
    assert first.returncode == 3, first.stderr
    (made,) = (tmp_path / "output").glob("run-*/model.ckpt-1.pt")
    second = in_process(
        "train", *flags, "--precision", "fp8", "--max_steps", 2, "--init_checkpoint", made,
        cwd=tmp_path,
    )  # fmt: skip
    assert second.returncode == 3, second.stderr
    assert "precision bf16 -> fp8" in second.stdout


def test_no_graph_is_replayed_before_scales_are_measured() -> None:
    """A graph has no measuring in it. None is captured here, so that a replay would fail."""
    model = make_model(tiny_config())
    state = Fp8State.of(model.bert.encoder, CPU)
    budget = Budget(tokens=64, sequences=3, masked=16, max_seqlen=16, dummies=4)
    step = MicroStep(model, CPU, budget, graph=True, fp8=state)
    weights = dict.fromkeys(model.losses, torch.ones(()))
    step(packed(padded_arrays([9, 16, 3], 16, 101)), weights)
    assert (state.table[2] > 0.0).all()
    state.update()
    with pytest.raises(IndexError):
        step(packed(padded_arrays([9, 16, 3], 16, 101)), weights)
