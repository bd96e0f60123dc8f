"""Kernels are proven in a process of their own, because a hung kernel ends only with its process.

The parent writes one question (a JSON object) per line to the child's standard input, and reads
one answer per line from a pipe of its own, since libraries print to standard output. A child that
gives no answer in time is killed; so is one whose operator raised, because an error of a device may
stay until the process ends. The next question starts a new child.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bert_pretraining.errors import Unavailable, UserError
from bert_pretraining.kernels import proof
from bert_pretraining.kernels.proof_problem import Problem, Sizes
from bert_pretraining.kernels.provider import Implementation, Target
from bert_pretraining.kernels.table import find
from bert_pretraining.runtime import arithmetic
from bert_pretraining.runtime import device as devices

START_SECONDS = 120.0  # for a child to import PyTorch and reach the device
# For one case: Triton compiles its kernels in it. The other ranks wait meanwhile, for at most
# process_group.COLLECTIVE_TIMEOUT; so a provider that has hung twice is not asked again.
CASE_SECONDS = 60.0
HANGS = 2
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG in <sys/prctl.h>
# What tells a process its place among the ranks. The child has none.
_OF_RANKS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)


@dataclass(frozen=True)
class Verdict:
    """What became of one provider's operator.

    fault: what is wrong with it; "" if nothing is. unavailable: why it cannot run at all, or "".
    seconds: of forward and backward at the run's sizes, if measured. may_pass: the same kernel may
    pass another time, as after an error for want of memory or an answer that came too late.
    """

    fault: str = ""
    unavailable: str = ""
    seconds: float | None = None
    may_pass: bool = False

    @property
    def passed(self) -> bool:
        return not self.fault and not self.unavailable


@dataclass(frozen=True)
class Limits:
    """Seconds that a child may take to start, and for one case."""

    start: float = START_SECONDS
    case: float = CASE_SECONDS


class NoAnswer(Exception):
    """The child did not answer: it hung, or its process ended."""

    def __init__(self, reason: str, hung: bool) -> None:
        super().__init__(reason)
        self.hung = hung


# ---- what answers the questions, in the child, or in this process where no child can run


class Answers:
    """Answers questions about providers' operators on one target."""

    def __init__(self, target: Target, sizes: Sizes) -> None:
        self._target, self._sizes = target, sizes
        self._problem: tuple[tuple[str, bool], Problem] | None = None  # the latest one
        self._found: dict[tuple[str, str], Implementation | Unavailable] = {}

    def __call__(self, question: dict) -> dict:
        """{"fault": text or None}, {"seconds": number}, {"unavailable": why} or
        {"raised": what}.

        question: the fields of a `Case` but its sizes, "provider", and "measure" (True: seconds).
        """
        operator, provider = question["operator"], question["provider"]
        try:
            found = self._found.get((operator, provider))
            if found is None:
                found = find(provider, operator, self._target)
                self._found[operator, provider] = found
            if isinstance(found, Unavailable):
                return {"unavailable": str(found)}
            case = proof.Case(operator, self._sizes, question["is_small"], question["dropout"])
            problem = self._problem_of(case)
            if question["measure"]:
                return {"seconds": proof.measure(found.function, problem, case.dropout)}
            return {"fault": proof.find_fault(found.function, problem, case.dropout)}
        except Exception as error:  # whatever a kernel raises is an answer
            lines = str(error).strip().splitlines() or [""]
            return {"raised": f"{type(error).__name__}: {lines[0][:200]}"}

    def _problem_of(self, case: proof.Case) -> Problem:
        key = (case.operator, case.is_small)
        if self._problem is None or self._problem[0] != key:
            self._problem = None  # frees its memory first
            self._problem = (key, case.problem(self._target))
        return self._problem[1]


def main() -> None:
    """The child: `python -m bert_pretraining.kernels.proof_process`. argv: the answers' pipe."""
    with contextlib.suppress(OSError, AttributeError):  # systems other than Linux have none
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    pipe = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")

    def tell(answer: dict) -> None:
        print(json.dumps(answer), file=pipe, flush=True)

    job = json.loads(sys.stdin.readline())
    try:
        if job["deterministic"]:
            arithmetic.use_deterministic_operators(job["device"].partition(":")[0])
        # The type's extension package comes first: without it torch.device does not know the type.
        kind, _, index = job["device"].partition(":")
        device = devices.choose(kind, int(index or 0)).device
        arithmetic.set_tf32(device, job["tf32"])
        (torch.ones(8, device=device) * 2).sum().item()
    except Exception as error:
        tell({"unusable": str(error).strip().splitlines()[0][:200]})
        return
    tell({"ready": True})
    target = Target(device, getattr(torch, job["dtype"]), job["head_size"])
    answers = Answers(target, Sizes(**{**job["sizes"], "lengths": tuple(job["sizes"]["lengths"])}))
    for line in sys.stdin:
        tell(answers(json.loads(line)))


# ---- the parent


class Child:
    """A running child. OSError if it cannot be started, Unusable if it cannot use the device."""

    def __init__(self, target: Target, sizes: Sizes, seconds: float) -> None:
        reading, writing = os.pipe()
        self._answers, self._pending = reading, b""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        command = [sys.executable, "-m", "bert_pretraining.kernels.proof_process", str(writing)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=self._output, stderr=subprocess.STDOUT,
                pass_fds=[writing], env=_environment(),
            )  # fmt: skip
        except OSError:
            os.close(reading)
            self._output.close()
            raise
        finally:
            os.close(writing)
        job = {
            "device": str(target.device),
            "dtype": str(target.dtype).removeprefix("torch."),
            "head_size": target.head_size,
            "deterministic": arithmetic.are_operators_deterministic(),
            "tf32": arithmetic.multiplies_in_tf32(target.device),
            "sizes": dataclasses.asdict(sizes),
        }
        try:
            started = self.ask(job, seconds)
            if "unusable" in started:
                raise OSError(started["unusable"])
        except NoAnswer as error:
            self.close()
            raise OSError(str(error)) from error
        except OSError:
            self.close()
            raise

    def ask(self, question: dict, seconds: float) -> dict:
        """The answer; raises NoAnswer."""
        with contextlib.suppress(BrokenPipeError):  # the child has ended: so its answers end too
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._pending:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._answers], [], [], left)[0]:
                raise NoAnswer(f"no answer within {seconds:g} s", hung=True)
            piece = os.read(self._answers, 65536)
            if not piece:
                raise NoAnswer(self._end(), hung=False)
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def _end(self) -> str:
        """How the process ended, and the last line that it printed."""
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        return f"its process ended {how}" + (f" ({lines[-1][:200]})" if lines else "")

    def close(self) -> None:
        """End the process at once, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        os.close(self._answers)
        self._output.close()


def _environment() -> dict[str, str]:
    """This process's environment for a child that is no rank, and that finds this package."""
    kept = {name: value for name, value in os.environ.items() if not _OF_RANKS.fullmatch(name)}
    base = str(Path(__file__).resolve().parents[2])
    paths = [path for path in kept.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept["PYTHONPATH"] = os.pathsep.join([*paths, *([] if base in paths else [base])])
    return kept


class Prover:
    """Asks children, or this process where a child cannot use the device.

    notices: lines for people, of what was unusual.
    """

    def __init__(self, target: Target, sizes: Sizes, limits: Limits) -> None:
        self._target, self._sizes, self._limits = target, sizes, limits
        self._child: Child | None = None
        self._here: Answers | None = None
        self._hangs: dict[str, int] = {}  # provider -> operators in which it hung
        self._answered = False
        self.notices: list[str] = []

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def prove(self, operator: str, providers: list[str]) -> dict[str, Verdict]:
        """A verdict for each provider of one operator. If two pass, their times are measured."""
        verdicts = {provider: Verdict() for provider in providers}
        for case in proof.cases(operator, self._sizes):
            for provider in [name for name, verdict in verdicts.items() if verdict.passed]:
                verdicts[provider] = self._answer(provider, case, measure=False)
        passing = [name for name, verdict in verdicts.items() if verdict.passed]
        if len(passing) > 1:
            for provider in passing:
                verdicts[provider] = self.measure(operator, provider)
        return verdicts

    def measure(self, operator: str, provider: str) -> Verdict:
        """The verdict with the seconds of a provider that has passed."""
        case = proof.Case(operator, self._sizes, is_small=False, dropout=self._sizes.dropout)
        return self._answer(provider, case, measure=True)

    def _answer(self, provider: str, case: proof.Case, measure: bool) -> Verdict:
        if self._hangs.get(provider, 0) >= HANGS:
            fault = f"not tried, because {provider} hung in {HANGS} operators"
            return Verdict(fault=fault, may_pass=True)
        question = {
            "operator": case.operator,
            "provider": provider,
            "is_small": case.is_small,
            "dropout": case.dropout,
            "measure": measure,
        }
        where = f"at {case.describe(self._target.dtype)}"
        try:
            answer = self._ask(question)
        except NoAnswer as error:
            self.close()
            if error.hung:
                self._hangs[provider] = self._hangs.get(provider, 0) + 1
            return Verdict(fault=f"{error} {where}", may_pass=True)
        if "raised" in answer:
            self.close()  # the device may be in error until the process ends
            return Verdict(fault=f"{answer['raised']} {where}", may_pass=True)
        fault = answer.get("fault")
        return Verdict(
            fault=f"{fault} {where}" if fault else "",
            unavailable=answer.get("unavailable", ""),
            seconds=answer.get("seconds"),
        )

    def _ask(self, question: dict) -> dict:
        if self._here is None and self._child is None:
            try:
                self._child = Child(self._target, self._sizes, self._limits.start)
            except OSError as error:
                if self._answered:
                    device = self._target.device
                    raise UserError(
                        f"{device} cannot be used any more after a kernel failed ({error})",
                        "restart the machine's driver, then choose other --kernels",
                    ) from error
                self.notices.append(
                    "kernels are proven in this process, without a time limit, because another "
                    f"process cannot use {self._target.device} ({error})"
                )
                self._here = Answers(self._target, self._sizes)
        self._answered = True
        if self._child is not None:
            return self._child.ask(question, self._limits.case)
        try:
            with devices.generators_kept(self._target.device):
                return self._here(question)
        except RuntimeError as error:  # after a kernel's error a device may refuse everything
            raise UserError(
                f"{self._target.device} cannot be used any more after {question['provider']}'s "
                f"{question['operator']} ({str(error).splitlines()[0][:200]})",
                f"choose other --kernels than {question['provider']}",
            ) from error


if __name__ == "__main__":
    main()
