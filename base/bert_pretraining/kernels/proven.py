"""The choice of kernels by proof: only those are used that were right on this very device.

`table.select` chooses by what is declared; `select_proven` runs every candidate first. Where
several providers of an operator are right, the fastest one at the run's sizes is taken, unless
the choice must not depend on a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from bert_pretraining.errors import UserError
from bert_pretraining.kernels import proof_cache, table
from bert_pretraining.kernels.proof_problem import Sizes
from bert_pretraining.kernels.proof_process import Limits, Prover, Verdict
from bert_pretraining.kernels.provider import OPERATORS, Implementation, Target
from bert_pretraining.kernels.table import LAST_RESORT, Candidates, Kernels
from bert_pretraining.runtime import agreement, process_group

FASTER = 0.9  # of the preferred provider's time: less counts as faster, not as noise
NOT_EVERYWHERE = Verdict(unavailable="it is not installed on every machine")

Verdicts = dict[str, dict[str, Verdict]]  # operator -> provider -> its verdict


def select_proven(
    provider: str,
    target: Target,
    sizes: Sizes,
    per_operator: Mapping[str, str] | None = None,
    again: bool = False,
    limits: Limits | None = None,
    by_time: bool = True,
) -> tuple[Kernels, list[str]]:
    """As `table.select`, but every candidate is proven at these sizes first. For all ranks at once.

    The first rank of each machine proves, and all ranks make the same choice: a kernel that is
    wrong on one machine is used on none. Verdicts come from the user's cache where they are known.

    again: prove those again that the cache knows as wrong.
    by_time: take the fastest of the right ones. If not, it is the preferred one, so that a resumed
        run computes with the same kernels whatever is measured.

    Returns the kernels, and what to tell the user, a line each. UserError if a provider that was
    asked for by name fails, or if no provider passes.
    """
    wanted = {
        operator: table.candidates(operator, provider, target, per_operator)
        for operator in OPERATORS
    }
    limits = limits or Limits()

    def prove(names: Mapping[str, Sequence[str]]) -> tuple[Verdicts, list[str]]:
        return _on_all_ranks(lambda: prove_here(names, target, sizes, again, limits), target.device)

    verdicts, notices = prove({operator: asked.names for operator, asked in wanted.items()})
    left = [
        operator
        for operator, asked in wanted.items()
        if not asked.flag and not any(one.passed for one in verdicts[operator].values())
    ]
    if left:
        resort, more = prove(dict.fromkeys(left, (LAST_RESORT,)))
        notices += more
        for operator, found in resort.items():
            verdicts[operator] |= found
    found = {}
    for operator, asked in wanted.items():
        found[operator] = _choose(operator, asked, verdicts[operator], target, notices, by_time)
    for operator, reason in _reasons(verdicts, provider, target, per_operator).items():
        old = found[operator]
        found[operator] = old._replace(description=f"{old.description} ({reason})")
    return table.assemble(found), notices


def prove_here(
    names: Mapping[str, Sequence[str]], target: Target, sizes: Sizes, again: bool, limits: Limits
) -> tuple[Verdicts, list[str]]:
    """Verdicts of these providers from the cache, or by a proof now; and notices.

    names: operator -> providers. If several pass, each verdict has its seconds.
    """
    verdicts: Verdicts = {}
    prover = Prover(target, sizes, limits)
    try:
        for operator, providers in names.items():
            known = {}
            for provider in providers:
                verdict = proof_cache.load(provider, operator, target, sizes)
                if verdict is not None and (verdict.passed or not again):
                    known[provider] = verdict
            missing = [provider for provider in providers if provider not in known]
            new = prover.prove(operator, missing) if missing else {}
            found = {provider: (known | new)[provider] for provider in providers}
            passing = [provider for provider, verdict in found.items() if verdict.passed]
            for provider in passing if len(passing) > 1 else []:
                if found[provider].seconds is None:
                    new[provider] = found[provider] = prover.measure(operator, provider)
            for provider, verdict in new.items():
                proof_cache.store(provider, operator, target, sizes, verdict)
            verdicts[operator] = found
    finally:
        prover.close()
    return verdicts, prover.notices


def _on_all_ranks(
    prove: Callable[[], tuple[Verdicts, list[str]]], device: torch.device
) -> tuple[Verdicts, list[str]]:
    """Prove on the first rank of each machine; the machines' worst verdicts, on every rank."""
    verdicts: Verdicts = {}
    notices: list[str] = []
    error: Exception | None = None
    proves = process_group.is_first_of_its_machine()
    if proves:
        try:
            verdicts, notices = prove()
        except Exception as raised:  # the other ranks must learn of it, or they would wait
            error = raised
    told = error if error is None or type(error) is UserError else RuntimeError(str(error))
    fault = agreement.first_said(told, device)
    if fault is not None:
        raise fault if error is None else error
    own_names = {operator: list(found) for operator, found in verdicts.items()}
    # Of the first rank that proves: rank 0 is not the first of its machine under every launcher.
    names = agreement.first_said(own_names if proves else None, device)
    worst: Verdicts = {}
    for operator, providers in names.items():
        worst[operator] = {}
        for provider in providers:
            mine = verdicts[operator].get(provider, NOT_EVERYWHERE) if proves else None
            worst[operator][provider] = _worst(mine, device)
    return worst, agreement.distinct(notices, device)


def _worst(mine: Verdict | None, device: torch.device) -> Verdict:
    """The first machine's verdict that is no pass; else the slowest, since all ranks wait for it.

    mine: this rank's verdict; None where it proves nothing.
    """
    passed = mine is not None and mine.passed
    failed = agreement.first_said(None if passed else mine, device)
    (seconds,) = process_group.largest([mine.seconds or 0.0 if passed else 0.0], device)
    return failed or Verdict(seconds=seconds or None)


def _choose(
    operator: str,
    asked: Candidates,
    verdicts: dict[str, Verdict],
    target: Target,
    notices: list[str],
    by_time: bool,
) -> Implementation:
    """The implementation of an operator; adds to the notices what was passed over."""
    passing = {name: verdict for name, verdict in verdicts.items() if verdict.passed}
    faults = [f"{name} {operator}: {one.fault}" for name, one in verdicts.items() if one.fault]
    if asked.flag:
        (name,) = asked.names
        if faults:
            raise UserError(
                f"{asked.flag}: {verdicts[name].fault} (in {operator})",
                f"{table.others(name)}, or pass --prove_kernels off to use it all the same",
            )
        if not passing:  # it cannot run here: the error says why
            per_operator = {operator: name} if asked.flag.startswith("--kernels.") else None
            table.select(name, target.device, target.dtype, target.head_size, per_operator)
    elif not passing:
        raise UserError(
            f"no provider's {operator} is right on {target.device} ({'; '.join(faults)})",
            "pass --device cpu, or --prove_kernels off to train all the same",
        )
    best = _fastest(passing) if by_time else next(iter(passing))
    notices += [f"{fault}: passed over, {best} runs it" for fault in faults]
    found = table.find(best, operator, target)
    times = [
        f"{'' if name == best else name + ' '}{1e3 * one.seconds:.3g} ms"
        for name, one in sorted(passing.items(), key=lambda item: item[0] != best)
        if one.seconds is not None
    ]
    if len(times) < 2:
        return found
    return found._replace(description=f"{found.description} ({', '.join(times)})")


def _fastest(passing: dict[str, Verdict]) -> str:
    """The first provider, unless another one is faster beyond the noise of timings.

    So a tie is chosen alike in every run: a resumed run computes with the same kernels.
    """
    times = {name: verdict.seconds or 0.0 for name, verdict in passing.items()}
    first = next(iter(times))
    fastest = min(times, key=lambda name: times[name])
    return fastest if times[fastest] < FASTER * times[first] else first


def _reasons(
    verdicts: Verdicts,
    provider: str,
    target: Target,
    per_operator: Mapping[str, str] | None,
) -> dict[str, str]:
    """Operator -> why the provider that would be expected could not be a candidate."""
    reasons = {}
    for operator in verdicts:
        wanted = (per_operator or {}).get(operator) or provider
        if wanted == "auto" and target.device.type != "cpu":
            wanted = "triton"
        if wanted == "auto":
            continue
        why = table.PROVIDERS[wanted].unavailable(target)
        if why is None and operator not in table.PROVIDERS[wanted].operators:
            why = f"{wanted} has no such kernel"
        if why is None and wanted in verdicts[operator]:
            why = verdicts[operator][wanted].unavailable
        if why:
            reasons[operator] = str(why)
    return reasons
