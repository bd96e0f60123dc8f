"""Does every kernel compute what it should?

Every provider that claims to run on the device is proven anew, operator by operator, in each dtype
in which `train` would use it: forward and gradients, with and without dropout, at a small odd
number of tokens (one sequence has a single token) and at BERT-large's sizes. What is right and
what the bounds are: see `kernels/proof.py`. With several ranks each rank's device is proven. The
layers in fp8 are checked too where the device has it. Each proof runs in a process of its own with
a time limit. The user's cache of proofs is neither read nor written.

Figures: `kernels`, "OPERATOR PROVIDER DTYPE" -> `verdict`, `fault`, `worst_share` (the largest
error as a share of its bound; all devices and cases), `implementation`, `proof_s`,
`forward_backward_s` (without --quick: of the largest batch, on the slowest device) and `cases`
(shape -> share); `unavailable`, provider or kernel -> why; `right`, `tried`, `worst_share`.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from bert_pretraining.bench.workload import BERT_LARGE
from bert_pretraining.errors import UserError
from bert_pretraining.kernels import DTYPES, OPERATORS, PROVIDERS, Target, proof
from bert_pretraining.kernels.proof_problem import Sizes
from bert_pretraining.kernels.proof_process import Limits, Prover, Tried
from bert_pretraining.kernels.table import NOT_ON_CPU
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.kept import keep_figures
from bert_pretraining.qualify.record import FAIL, NOTE, PASS, Finding
from bert_pretraining.qualify.stages import Tell
from bert_pretraining.runtime import arithmetic
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.words import counted
from bert_pretraining.training.kernel_choice import batch_sizes

LIMITS, QUICK_CPU_LIMITS = Limits(), Limits(start=60.0, case=40.0)
BUDGET = 500.0  # seconds after which no larger batch is begun
# On a CPU most of the proof's time goes to attention, and grows with the cube of a sequence's
# length.
QUICK_LENGTHS_ON_CPU = (96, 1, 64)
FP8 = "fp8_linear"
RECENT_CAPABILITY = (8, 0)  # CUDA devices from it on have bf16, and flash attention in PyTorch


@dataclass
class Kernel:
    """One provider's operator in one dtype, and what its proofs found.

    faults: one a device. skipped: why not all sizes were tried. cases: shape -> share of the bound.
    """

    operator: str
    provider: str
    dtype: str
    implementation: str = ""
    faults: list[str] = field(default_factory=list)
    skipped: str = ""
    cases: dict[str, float | None] = field(default_factory=dict)
    proof_s: float = 0.0
    forward_backward_s: float | None = None

    @property
    def name(self) -> str:
        return f"{self.operator} {self.provider} {self.dtype}"

    @property
    def worst(self) -> float:
        """The largest error as a share of its bound."""
        return max((share for share in self.cases.values() if share is not None), default=0.0)

    def take(self, other: Kernel) -> None:
        """Add what another device found."""
        self.faults += other.faults
        self.skipped = self.skipped or other.skipped
        for case, share in other.cases.items():
            shares = (share, self.cases.get(case))
            self.cases[case] = max((one for one in shares if one is not None), default=None)
        self.proof_s = max(self.proof_s, other.proof_s)
        times = (self.forward_backward_s, other.forward_backward_s)
        self.forward_backward_s = max((one for one in times if one is not None), default=None)

    def figures(self) -> dict[str, object]:
        return {
            "verdict": FAIL if self.faults else PASS,
            "fault": "; ".join(self.faults),
            "worst_share": self.worst,
            "implementation": self.implementation,
            "proof_s": self.proof_s,
            "forward_backward_s": self.forward_backward_s,
            "cases": self.cases,
        }


def run(context: Context, tell: Tell) -> Finding:
    """Prove all kernels on the devices of all ranks, which work at the same time."""
    if context.config.deterministic:
        arithmetic.use_deterministic_operators(context.device)
    places = [torch.device("cpu")]
    if context.device != "cpu":
        places = [torch.device(context.device, rank) for rank in range(context.ranks)]
    arithmetic.set_tf32(places[0], context.config.allow_tf32)
    dtypes = trained_dtypes(places[0])
    lock = threading.Lock()

    def keep() -> None:
        with lock:
            found = _of_all(proofs, places[0])
            is_wrong = found.figures["right"] < found.figures["tried"]
            fault = found.reason if is_wrong else ""
            keep_figures(context, "kernels", found.figures, found.notes, fault)

    proofs = [DeviceProof(context, place, dtypes, tell, lock, keep) for place in places]
    if context.device != "cpu":
        without = dict.fromkeys(DTYPES, "the device does not compute in it")
        proofs[0].unavailable.update({n: why for n, why in without.items() if n not in dtypes})
    with ThreadPoolExecutor(len(places)) as threads:
        list(threads.map(DeviceProof.run, proofs))
    return _of_all(proofs, places[0])


def _of_all(proofs: list[DeviceProof], device: torch.device) -> Finding:
    """The finding from the proofs on all devices."""
    kernels: dict[str, Kernel] = {}
    unavailable: dict[str, str] = {}
    notices: list[str] = []
    for one in proofs:
        for name, kernel in one.kernels.items():
            new = dataclasses.replace(kernel, faults=[], cases={})
            kernels.setdefault(name, new).take(kernel)
        unavailable.update(one.unavailable)
        notices += [line for line in one.notices if line not in notices]
    return conclude(list(kernels.values()), unavailable, notices, device)


def conclude(
    kernels: list[Kernel],
    unavailable: dict[str, str],
    notices: list[str],
    device: torch.device,
) -> Finding:
    """The finding from all proofs."""
    wrong = [kernel for kernel in kernels if kernel.faults]
    right = [kernel for kernel in kernels if not kernel.faults]
    worst = max(right, key=lambda kernel: kernel.worst, default=None)
    figures: dict[str, object] = {
        "right": len(right),
        "tried": len(kernels),
        "worst_share": worst.worst if worst else None,
        "kernels": {kernel.name: kernel.figures() for kernel in kernels},
        "unavailable": unavailable,
    }
    notes = [f"{name}: {why}" for name, why in unavailable.items()] + notices
    notes += [f"{one.name}: {one.skipped}" for one in kernels if one.skipped]
    if wrong:
        told = [f"{kernel.name}: {'; '.join(kernel.faults)}" for kernel in wrong]
        reason = f"{len(wrong)} of {len(kernels)} are wrong: {told[0]}; {_fix(wrong[0], right)}"
        return Finding(FAIL, reason, figures, [*told[1:], *notes])
    reason = f"{len(right)} of {len(kernels)} right"
    if worst is not None:
        reason += f"; worst error {worst.worst:.2f} of its bound ({worst.name})"
    missing = _missing(kernels, unavailable, device)
    if not right:
        return Finding(FAIL, "no provider's kernels run on this device", figures, notes)
    if missing:
        return Finding(NOTE, f"{reason}; {missing[0]}", figures, [*missing[1:], *notes])
    return Finding(PASS, reason, figures, notes)


def _fix(wrong: Kernel, right: Iterable[Kernel]) -> str:
    """What to try, as an order."""
    if wrong.operator == FP8:
        return "pass --precision bf16"
    same = [
        one.provider for one in right if (one.operator, one.dtype) == (wrong.operator, wrong.dtype)
    ]
    if not same:
        return "do not train on this device until its driver, PyTorch or hardware is repaired"
    return f"pass --kernels.{wrong.operator} {same[-1]}, and update {wrong.provider} or the driver"


def _missing(kernels: list[Kernel], unavailable: dict[str, str], device: torch.device) -> list[str]:
    """What usually runs on such a device, and does not here."""
    if not devices.is_cuda(device):
        return []
    capability = devices.capability(device)
    is_recent = capability is not None and capability >= RECENT_CAPABILITY
    usual = ("triton", "fp16", *(["bf16"] if is_recent else []))
    lost = [
        f"{name} does not run: {why}"
        for name, why in unavailable.items()
        if name in usual or "triton" in name
    ]
    if is_recent and not getattr(torch.version, "hip", None):
        lost += [
            f"{one.name} runs without flash attention ({one.implementation})"
            for one in kernels
            if "flash refused" in one.implementation and DTYPES[one.dtype].itemsize == 2
        ]
    return lost


def trained_dtypes(device: torch.device) -> list[str]:
    """Those in which `train` would compute on the device; on a CPU it does not take fp16."""
    if device.type == "cpu":
        return ["fp32", "bf16"]
    # A device that does not even multiply in float32 must not pass for want of kernels.
    return ["fp32", *(name for name in DTYPES if name != "fp32" and _computes(device, name))]


def _computes(device: torch.device, dtype: str) -> bool:
    emulated = dtype == "bf16" and devices.emulates_bf16(device)
    return not emulated and devices.supports(device, DTYPES[dtype])


class DeviceProof:
    """The proofs on one device.

    Attributes:
        kernels: name -> what was found. unavailable: provider or kernel -> why it cannot run.
        notices: lines for people.

    Args:
        lock: is held while one of these changes. keep: is called when a case has been proven.
    """

    def __init__(
        self,
        context: Context,
        device: torch.device,
        dtypes: list[str],
        tell: Tell,
        lock: threading.Lock,
        keep: Callable[[], None],
    ) -> None:
        self.kernels: dict[str, Kernel] = {}
        self.unavailable: dict[str, str] = {}
        self.notices: list[str] = []
        self._context, self._device, self._dtypes, self._tell = context, device, dtypes, tell
        self._lock, self._keep = lock, keep
        is_quick = context.quick and device.type == "cpu"  # elsewhere a case compiles kernels
        self._limits = QUICK_CPU_LIMITS if is_quick else LIMITS
        self._hangs: dict[str, int] = {}
        self._deadline = time.monotonic() + BUDGET

    def run(self) -> None:
        """Prove all kernels, the small batches first."""
        for number, sizes in enumerate(self._sizes()):
            if number and time.monotonic() > self._deadline:
                self.notices.append(
                    f"batches of {counted(len(sizes.lengths), 'sequence')} and more were not tried "
                    f"on {self._device}, since the stage's time was over"
                )
                return
            for dtype in self._dtypes:
                if not self._prove_dtype(dtype, sizes, with_small=number == 0):
                    return

    def _sizes(self) -> list[Sizes]:
        """Of the batches, in the order of their sizes."""
        context = self._context
        counts = context.batch_sizes[:1] if context.quick else context.batch_sizes
        found = [
            batch_sizes(
                dataclasses.replace(context.config, train_batch_size=count, static_tokens=0),
                BERT_LARGE,
            )
            for count in counts
        ]
        if context.quick and context.device == "cpu":
            tokens = sum(QUICK_LENGTHS_ON_CPU)
            quick = {"lengths": QUICK_LENGTHS_ON_CPU, "masked": round(0.15 * tokens)}
            found = [dataclasses.replace(found[0], **quick)]
        return found

    def _prove_dtype(self, dtype: str, sizes: Sizes, with_small: bool) -> bool:
        """Prove all kernels of a dtype at these sizes; False if the device is not usable after."""
        target = Target(self._device, DTYPES[dtype], BERT_LARGE.head_size)
        prover = Prover(target, sizes, self._limits, self._hangs)
        present: Kernel | None = None
        try:
            for operator in OPERATORS:
                providers = self._providers(operator, target)
                for case in proof.cases(operator, sizes):
                    for provider in providers if with_small or not case.is_small else []:
                        present = Kernel(operator, provider, dtype)
                        self._case(prover, present, case, len(sizes.lengths))
                for provider in providers if not self._context.quick else []:
                    known = self.kernels.get(Kernel(operator, provider, dtype).name)
                    if known is not None and not known.faults and not known.skipped:
                        known.forward_backward_s = prover.measure(operator, provider).seconds
            if with_small and dtype == self._dtypes[-1] and DTYPES[dtype].itemsize == 2:
                present = Kernel(FP8, "fp8", dtype)
                self._record(present, "layers", lambda: prover.try_fp8(_fp8_layers()))
        except UserError as error:  # the device refuses everything after a kernel's error
            with self._lock:
                kernel = self.kernels.setdefault(present.name, present)
            kernel.faults.append(f"{error} (on {self._device})")
            return False
        finally:
            self.notices += [line for line in prover.notices if line not in self.notices]
            prover.close()
        return True

    def _providers(self, operator: str, target: Target) -> list[str]:
        """The providers that have the operator, and do not say that they cannot run here."""
        found = []
        for name, provider in PROVIDERS.items():
            if self._device.type == "cpu" and name in NOT_ON_CPU:
                continue
            why = provider.unavailable(target)
            if why is not None:
                with self._lock:
                    self.unavailable[name] = str(why)
            elif operator in provider.operators:
                found.append(name)
        return found

    def _case(self, prover: Prover, kernel: Kernel, case: proof.Case, sequences: int) -> None:
        known = self.kernels.get(kernel.name)
        if kernel.name in self.unavailable or (known and (known.faults or known.skipped)):
            return
        self._tell(f"kernels: {kernel.name}, {counted(sequences, 'sequence')}")
        shape = case.describe(DTYPES[kernel.dtype])
        self._record(kernel, shape, lambda: prover.try_case(kernel.provider, case))

    def _record(self, kernel: Kernel, shape: str, attempt: Callable[[], Tried]) -> None:
        """Prove a case, and keep what was found."""
        started = time.perf_counter()
        tried = attempt()
        with self._lock:
            self._take(kernel, shape, tried, time.perf_counter() - started)
        self._keep()

    def _take(self, kernel: Kernel, shape: str, tried: Tried, seconds: float) -> None:
        if tried.verdict.unavailable:
            self.unavailable[kernel.name] = tried.verdict.unavailable
            return
        kernel = self.kernels.setdefault(kernel.name, kernel)
        kernel.proof_s += seconds
        kernel.implementation = tried.description or kernel.implementation
        if tried.out_of_memory:
            kernel.skipped = f"no larger size was tried: {tried.verdict.fault}"
            return
        kernel.cases[shape] = tried.worst
        if tried.verdict.fault:
            kernel.faults.append(f"{tried.verdict.fault} (on {self._device})")


def _fp8_layers() -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of an encoder layer's four products."""
    hidden, inner = BERT_LARGE.hidden_size, BERT_LARGE.intermediate_size
    return ((hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden))
