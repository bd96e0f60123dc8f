"""`bench kernels`: the time of every operator of every provider that runs on this machine.

On a GPU, the matrix products of the model are measured too: they show how much of a step
the operators can save at most.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bert_pretraining.bench import record
from bert_pretraining.bench.flags import BENCH
from bert_pretraining.bench.step import setting_of, step_parser
from bert_pretraining.bench.timing import alternate, announce
from bert_pretraining.bench.workload import batch_of
from bert_pretraining.kernels import DTYPES, PROVIDERS, Target, select, unavailable
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.runtime import device as devices


def inputs_of(
    config: BertConfig, batch: PackedBatch, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[list[Tensor], Callable[[Callable, list[Tensor]], Tensor]]]:
    """Operator -> the tensors that get gradients, and how to call it with them."""
    hidden, inner, tokens = config.hidden_size, config.intermediate_size, batch.num_tokens
    heads, masked = config.num_attention_heads, batch.num_masked
    epsilon, dropout = config.layer_norm_epsilon, config.hidden_dropout_prob

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    def attention(function: Callable, given: list[Tensor]) -> Tensor:
        probability = config.attention_probs_dropout_prob
        return function(*given, batch.cu_seqlens, batch.max_seqlen, probability)

    def embedding(function: Callable, given: list[Tensor]) -> Tensor:
        ids = (batch.input_ids, batch.position_ids, batch.segment_ids)
        return function(*ids, *given, epsilon, dropout)

    tables = (config.padded_vocab_size, config.max_position_embeddings, config.type_vocab_size)
    return {
        "attention": ([random(tokens, 3, heads, config.head_size)], attention),
        "bias_gelu": (
            [random(tokens, inner), random(inner)],
            lambda function, given: function(*given),
        ),
        "bias_dropout_residual_layer_norm": (
            [random(*shape) for shape in ((tokens, hidden), (hidden,), (tokens, hidden))]
            + [random(hidden), random(hidden)],
            lambda function, given: function(*given, epsilon, dropout),
        ),
        "embedding_layer_norm_dropout": (
            [*(random(rows, hidden) for rows in tables), random(hidden), random(hidden)],
            embedding,
        ),
        "masked_cross_entropy": (
            [random(masked, config.padded_vocab_size)],
            lambda function, given: function(*given, batch.masked_labels)[0],
        ),
    }


def differentiate(
    function: Callable, given: list[Tensor], call: Callable[[Callable, list[Tensor]], Tensor]
) -> None:
    """Call an operator once, and compute its gradients."""
    out = call(function, given)
    torch.autograd.grad(out, given, torch.ones_like(out))


def matrix_products(
    config: BertConfig, tokens: int, masked: int, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], None], float]]:
    """Name -> (forward and both gradients, floating-point operations) of the model's products."""
    hidden, inner, vocabulary = (
        config.hidden_size,
        config.intermediate_size,
        config.padded_vocab_size,
    )
    shapes = {
        "qkv": (tokens, hidden, 3 * hidden),
        "attention output": (tokens, hidden, hidden),
        "intermediate": (tokens, hidden, inner),
        "output": (tokens, inner, hidden),
        "vocabulary": (masked, hidden, vocabulary),
    }
    products = {}
    for name, (rows, inputs, outputs) in shapes.items():
        x = torch.randn(rows, inputs, device=device).to(dtype)
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        gradient = torch.randn(rows, outputs, device=device).to(dtype)

        def run(x: Tensor = x, weight: Tensor = weight, gradient: Tensor = gradient) -> None:
            _ = x @ weight.T, gradient @ weight, gradient.T @ x

        products[f"matrix product: {name}"] = (run, 6.0 * rows * inputs * outputs)
    return products


def measure(
    config: BertConfig,
    lengths: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    keep: Callable[[dict, dict], None] = lambda _results, _refused: None,
) -> tuple[dict[str, dict[str, dict]], dict[str, list[str]]]:
    """Operator -> provider -> spread of seconds; and "provider: why not" -> operators.

    keep: called with both after each operator.
    """
    batch = batch_of(lengths, config).to(device)
    results: dict[str, dict[str, dict]] = {}
    refused: dict[str, list[str]] = {}
    target = Target(device, dtype, config.head_size)
    for operator, (given, call) in inputs_of(config, batch, device, dtype).items():
        announce(f"{operator}, {dtype}")
        candidates = {}
        for provider in PROVIDERS:
            why_not = unavailable(provider, operator, target)
            if why_not:
                refused.setdefault(f"{provider}: {why_not}", []).append(operator)
                continue
            kernels = select("torch", device, dtype, config.head_size, {operator: provider})
            candidates[provider] = partial(differentiate, getattr(kernels, operator), given, call)
        times = alternate(candidates, device, repeats, capture=True)
        results[operator] = {name: one.figures() for name, one in times.items()}
        keep(results, refused)
    if device.type != "cpu":
        products = matrix_products(config, batch.num_tokens, batch.num_masked, device, dtype)
        runs = {name: run for name, (run, _) in products.items()}
        for name, one in alternate(runs, device, repeats, capture=True).items():
            figures = one.figures()
            results[name] = {
                "torch": {**figures, "flop_per_second": products[name][1] / figures["median"]}
            }
        keep(results, refused)
    return results, refused


def line_of(operator: str, provider: str, figures: dict, is_fastest: bool) -> str:
    """One line of the table, in milliseconds."""
    line = (
        f"  {operator:<34} {provider:<10} {1e3 * figures['median']:>9.3f} "
        f"({1e3 * figures['min']:.3f} to {1e3 * figures['max']:.3f}, n {figures['n']})"
    )
    if "host" in figures:
        line += f"; host {1e3 * figures['host']['median']:.3f} ({figures['method']})"
    if "flop_per_second" in figures:
        line += f"; {figures['flop_per_second'] / 1e12:.1f} TFLOP/s"
    return line + (" (fastest)" if is_fastest else "")


def main(arguments: list[str]) -> int:
    """Print a table and, with --output, keep the figures."""
    flags = step_parser(
        f"{BENCH} kernels",
        "Time every operator of every provider that runs on this machine, forward and backward; "
        "on a GPU the matrix products of the model too, which show what the rest can save at most. "
        "On a GPU the time is that between two events of the device, or of a replayed graph where "
        "the host would be too slow; the host's time for one call stands beside it.",
    ).parse(arguments)
    device, config, lengths = setting_of(flags)
    results: dict[str, dict] = {}
    refused: dict[str, dict] = {}
    described = {
        "device": devices.name(device),
        "lengths": lengths.tolist(),
        "threads": torch.get_num_threads(),
        "results": results,
        "not_run": refused,
    }

    def keep(precision: str, found: dict, not_run: dict) -> None:
        results[precision], refused[precision] = found, not_run
        if flags.output:
            record.write(flags.output, described)

    for precision in flags.precision:
        found, not_run = measure(
            config, lengths, device, DTYPES[precision], flags.repeats, partial(keep, precision)
        )
        print(f"{precision}, {int(lengths.sum())} tokens, milliseconds forward and backward")
        for operator, providers in found.items():
            fastest = min(figures["median"] for figures in providers.values())
            for provider, figures in providers.items():
                is_fastest = figures["median"] == fastest and len(providers) > 1
                print(line_of(operator, provider, figures, is_fastest))
        for why, operators in not_run.items():
            print(f"  not run: {why} ({', '.join(operators)})")
        keep(precision, found, not_run)
    return 0
