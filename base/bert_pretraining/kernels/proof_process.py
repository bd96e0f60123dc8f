"""Kernels are proven in a process of their own, because a hung kernel ends only with its process.

The parent writes one question (a JSON object) per line to the child's standard input, and reads
one answer per line from a pipe of its own, since libraries print to standard output. A child that
gives no answer in time is killed; so is one whose operator raised, because an error of a device may
stay until the process ends. The next question starts a new child.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bert_pretraining.errors import Unavailable, UserError
from bert_pretraining.kernels import fp8_linear, proof
from bert_pretraining.kernels.fp8_engine import engine_for
from bert_pretraining.kernels.proof_problem import Problem, Sizes
from bert_pretraining.kernels.provider import Implementation, Target
from bert_pretraining.kernels.table import find
from bert_pretraining.runtime import arithmetic, rank_variables
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.parent import end_with_parent
from bert_pretraining.runtime.process_memory import says_no_memory

START_SECONDS = 120.0  # for a child to import PyTorch and reach the device
# For one case: Triton compiles its kernels in it. The other ranks wait meanwhile, for at most
# process_group.COLLECTIVE_TIMEOUT; so a provider that has hung twice is not asked again.
CASE_SECONDS = 60.0
HANGS = 2


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
class Tried:
    """What became of one case.

    worst: the largest error as a share of its bound; see `proof.Judgement`. description: of the
    implementation. out_of_memory: the fault is that the device has not enough memory.
    """

    verdict: Verdict
    worst: float | None = None
    description: str = ""
    out_of_memory: bool = False


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
        """{"fault": text or None, "worst", "description"}, {"seconds": number},
        {"unavailable": why} or {"raised": what}.

        question: the fields of a `Case` but its sizes, "provider", and "measure" (True: seconds);
        or "features" alone: layers in fp8 of these (inputs, outputs).
        """
        try:
            if "features" in question:
                return self._fp8([tuple(pair) for pair in question["features"]])
            operator, provider = question["operator"], question["provider"]
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
            judged = proof.judge(found.function, problem, case.dropout)
            return {**dataclasses.asdict(judged), "description": found.description}
        except Exception as error:  # whatever a kernel raises is an answer
            lines = str(error).strip().splitlines() or [""]
            return {"raised": f"{type(error).__name__}: {lines[0][:200]}"}

    def _fp8(self, features: list[tuple[int, int]]) -> dict:
        device = self._target.device
        try:
            engine = engine_for(device)
        except UserError as error:
            return {"unavailable": error.problem}
        try:
            worst = fp8_linear.check(device, self._target.dtype, tuple(features))
        except UserError as error:
            return {"fault": error.problem, "worst": None, "description": engine.name}
        return {"fault": None, "worst": worst, "description": engine.name}

    def _problem_of(self, case: proof.Case) -> Problem:
        key = (case.operator, case.is_small)
        if self._problem is None or self._problem[0] != key:
            self._problem = None  # frees its memory first
            self._problem = (key, case.problem(self._target))
        return self._problem[1]


def main() -> None:
    """The child: `python -m bert_pretraining.kernels.proof_process`. argv: the answers' pipe."""
    end_with_parent(os.getppid())
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
                pass_fds=[writing], env=rank_variables.environment_without_rank(),
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


class Prover:
    """Asks children, or this process where a child cannot use the device.

    hangs: provider -> how often it has hung before; is counted on.
    notices: lines for people, of what was unusual.
    """

    def __init__(
        self, target: Target, sizes: Sizes, limits: Limits, hangs: dict[str, int] | None = None
    ) -> None:
        self._target, self._sizes, self._limits = target, sizes, limits
        self._child: Child | None = None
        self._here: Answers | None = None
        self._hangs = {} if hangs is None else hangs
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
                verdicts[provider] = self.try_case(provider, case).verdict
        passing = [name for name, verdict in verdicts.items() if verdict.passed]
        if len(passing) > 1:
            for provider in passing:
                verdicts[provider] = self.measure(operator, provider)
        return verdicts

    def measure(self, operator: str, provider: str) -> Verdict:
        """The verdict with the seconds of a provider that has passed."""
        case = proof.Case(operator, self._sizes, is_small=False, dropout=self._sizes.dropout)
        return self._answer(provider, _question(provider, case, True), self._where(case)).verdict

    def try_case(self, provider: str, case: proof.Case) -> Tried:
        """What becomes of one case; nothing is measured."""
        return self._answer(provider, _question(provider, case, False), self._where(case))

    def try_fp8(self, features: Sequence[tuple[int, int]]) -> Tried:
        """What becomes of layers of these (inputs, outputs) in fp8."""
        return self._answer("fp8", {"features": features}, "in a layer in fp8")

    def _where(self, case: proof.Case) -> str:
        return f"at {case.describe(self._target.dtype)}"

    def _answer(self, provider: str, question: dict, where: str) -> Tried:
        if self._hangs.get(provider, 0) >= HANGS:
            fault = f"not tried, because {provider} hung in {HANGS} operators"
            return Tried(Verdict(fault=fault, may_pass=True))
        try:
            answer = self._ask(provider, question)
        except NoAnswer as error:
            self.close()
            if error.hung:
                self._hangs[provider] = self._hangs.get(provider, 0) + 1
            return Tried(Verdict(fault=f"{error} {where}", may_pass=True))
        if "raised" in answer:
            self.close()  # the device may be in error until the process ends
            raised = answer["raised"]
            verdict = Verdict(fault=f"{raised} {where}", may_pass=True)
            return Tried(verdict, out_of_memory=says_no_memory(raised))
        fault = answer.get("fault")
        verdict = Verdict(
            fault=f"{fault} {where}" if fault else "",
            unavailable=answer.get("unavailable", ""),
            seconds=answer.get("seconds"),
        )
        return Tried(verdict, answer.get("worst"), answer.get("description", ""))

    def _ask(self, provider: str, question: dict) -> dict:
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
                f"{self._target.device} cannot be used any more after {provider}'s "
                f"{question.get('operator', 'layers')} ({str(error).splitlines()[0][:200]})",
                f"choose other --kernels than {provider}",
            ) from error


def _question(provider: str, case: proof.Case, measure: bool) -> dict:
    return {
        "operator": case.operator,
        "provider": provider,
        "is_small": case.is_small,
        "dropout": case.dropout,
        "measure": measure,
    }


if __name__ == "__main__":
    main()
