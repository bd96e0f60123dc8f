"""One training run on one rank, top to bottom: set up, evaluate, loop, report."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence

from bert_pretraining.config import Config, Resolved
from bert_pretraining.data.inputs import data_paths
from bert_pretraining.errors import (
    EXIT_CONVERGED,
    EXIT_NOT_CONVERGED,
    EXIT_STOPPED,
    TrainingError,
    UserError,
)
from bert_pretraining.logs.run_log import RunLog
from bert_pretraining.model.losses import LossMeans
from bert_pretraining.progress import RunState
from bert_pretraining.report.after_run import report_on
from bert_pretraining.runtime import (
    agreement,
    arithmetic,
    output,
    process_group,
    rank_reports,
    rank_variables,
    replicas,
)
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.ranges import range_of
from bert_pretraining.runtime.signals import StopRequest
from bert_pretraining.training.outcomes import UpdateResult
from bert_pretraining.training.profiling import Profile
from bert_pretraining.training.session import Session


def main(resolved: Resolved) -> int:
    """Train as configured; the process group is left for the caller to stop.

    Returns EXIT_CONVERGED, EXIT_NOT_CONVERGED or EXIT_STOPPED, on every rank.
    """
    config = resolved.config
    stop = StopRequest()
    output.when_lost(stop.output_lost)
    # A launched rank that has finished waits for the others, which may still save. A signal now
    # would end it, and the launcher would then end them.
    with stop.listening(ignore_afterwards=rank_reports.is_launched()):
        # Thousands of ranks may share the file system: one on each machine lists the shards, and
        # tells the others if it finds a fault. They would wait for it in vain.
        is_first = rank_variables.read(os.environ).local_rank == 0
        paths = fault = None
        try:
            paths = data_paths(config, list_folders=is_first)
        except UserError as error:
            fault = error
            if is_first:
                _tell_before_waiting(fault)
        if config.deterministic:
            arithmetic.use_deterministic_operators(config.device)
        try:
            settings = dataclasses.asdict(config)
            with stop.ending_at_once():  # it waits for the other ranks in C++
                ranks = process_group.start(config.device, config.dist_backend, settings)
        except TrainingError:
            if fault is None:
                raise
            raise fault from None  # what this rank knows is nearer to the cause
        fault = agreement.first_said(fault, ranks.device)
        if fault is not None:
            raise fault
        arithmetic.set_tf32(ranks.device, config.allow_tf32)
        config = _with_the_ranks_there_are(config, ranks)
        resolved = dataclasses.replace(resolved, config=config)
        device_name = devices.name(ranks.device)
        log = RunLog(resolved, ranks.rank, device_name, ranks.world_size, stop.fail)
        run, session = RunState(), None
        try:
            for notice in (*ranks.notices, *devices.shortcomings(ranks.device)):
                log.say(f"Notice: {notice}")
            if config.deterministic:
                log.say("Deterministic: sums in a fixed order; kernels by preference, not by time")
            log.measure_energy(ranks.device)
            with Profile(config, ranks, log) as profile:
                session = Session(config, paths, ranks, log, run)
                session.start_the_clock()
                reason = train(session, stop, profile)
        except BaseException as error:
            # The process group stays as it is: to leave it now would make the other ranks
            # fail, and report it, before this one has reported the cause.
            log.aborted(run)
            if isinstance(error, UserError):
                log.discard()
            raise
        finally:
            if session is not None:
                session.close()
            log.close()
    if config.report and ranks.is_main:
        print(report_on(log.folder), flush=True)
    if stop.failure is not None:  # too late to matter: the run had its end
        print(f"Warning: {stop.failure}", file=sys.stderr)
    if reason == "signal":
        return EXIT_STOPPED
    return EXIT_CONVERGED if run.converged else EXIT_NOT_CONVERGED


def _tell_before_waiting(fault: UserError) -> None:
    """Print a fault of the input before this rank waits for the others, to tell them.

    They may never come: where the variables of a rank are left over in a shell. A launcher of this
    package has looked at the input itself, and has started all ranks.
    """
    several = rank_variables.read(os.environ).world_size > 1
    if several and not rank_reports.is_launched():
        seconds = process_group.CONNECT_TIMEOUT.seconds
        print(
            f"Notice: {fault}; this rank ends once it has told the others, and waits at most "
            f"{seconds} s for them",
            file=sys.stderr,
            flush=True,
        )


def _with_the_ranks_there_are(config: Config, ranks: Ranks) -> Config:
    """A launcher starts as many ranks as the configuration says; without one there is one rank."""
    if config.world_size == ranks.world_size:
        return config
    return dataclasses.replace(config, nnodes=1, nproc_per_node=ranks.world_size)


def train(session: Session, stop: StopRequest, profile: Profile) -> str:
    """Train until the run ends, and return why: "target", "max_steps", ... or "signal".

    Raises, on every rank, the error for which a rank asked to stop, once the run is saved.
    """
    config, log, run = session.config, session.log, session.run
    update, triggers, order = session.training.update, session.triggers, session.order
    outcomes = update.outcomes
    samples_per_step = config.global_batch_size
    reason = session.begin()
    batches = session.micro_batches(stop)
    epoch = None
    with stop.deferred():
        while reason is None:
            profile.before_update(run.global_steps + outcomes.num_unread + 1)
            first_sample = run.samples_seen
            if order.epoch(first_sample) != epoch:
                if epoch is not None:
                    log.epoch_ended(epoch)
                epoch = order.epoch(first_sample)
                log.epoch_began(epoch)

            # ---- forward, backward, reduction and the optimizer's step
            with session.training.clock.part("data"):
                taken = [next(batches) for _ in range(config.gradient_accumulation_steps)]
            totals = update(taken)
            rank_reports.heartbeat(updates=1)
            run.samples_seen += samples_per_step

            # ---- the host does not wait for the device until something may be due
            expected = run.after(outcomes.num_unread, samples_per_step)
            learn = outcomes.read if triggers.anything_due(*expected) else outcomes.look
            with range_of("outcomes"):
                result = learn(run.global_steps, totals, stop.asked)
            if result is None:
                continue
            step = run.account(result.updates, result.skipped, result.last_finite, samples_per_step)
            if result.skipped:
                log.skipped(run, result.skipped, result.loss_scale)
            if step and triggers.replica_check_due(step):
                weights = dict(session.training.module.named_parameters())
                replicas.check_replicas(weights, run.global_steps)

            # ---- evaluate where due, and always after the last step
            evaluation = None
            if step:
                # The target may be met already, by the start weights: upstream counts them too.
                # The run then ends here, even if this evaluation finds a lower accuracy.
                reason = session.stop_reason()
                if reason or triggers.evaluation_due(step, run.num_trained_samples):
                    with range_of("evaluation"):
                        evaluation = session.evaluate()
                if reason != "target":
                    reason = session.stop_reason()
            if reason is None and result.stopping:
                reason = "signal"

            # ---- tell, and save
            figures = work = None
            if step and (triggers.logging_due(step) or evaluation):
                work = session.work()
                figures = {
                    **_step_figures(session, totals.names, result, step),
                    "epoch": epoch,
                    "end_training": reason is not None,
                    "iter_dataloader_idx": order.shard_ordinal(first_sample),
                }
            seconds = evaluation.seconds if evaluation else None
            with range_of("logging"):
                log.steps(run, result.updates, samples_per_step, figures, seconds, work)
            saving = step and config.save_checkpoint and reason is None
            if saving and triggers.checkpoint_due(run.num_trained_samples):
                with range_of("saving"):
                    session.save()
            session.report_saved()

        batches.close()
        _end(session, stop, reason, epoch, profile)
    return reason


def _end(
    session: Session, stop: StopRequest, reason: str, epoch: int | None, profile: Profile
) -> None:
    """Save, and tell the end. epoch: None for a run that had finished before."""
    run, log = session.run, session.log
    if reason != "signal":
        profile.ended()
    if epoch is not None:
        log.epoch_ended(epoch)
    process_group.barrier(session.ranks.device)
    log.trained(run)
    # A run that had finished before has nothing new to save.
    if epoch is not None and (session.config.save_checkpoint or reason == "signal"):
        session.save()
        session.report_saved(wait=True)
        # The run has its result; only a run that was to go on is nothing without its checkpoint.
        if reason != "signal" and not session.is_saved() and session.ranks.is_main:
            print(f"Warning: {_lost(None)}", file=sys.stderr, flush=True)
    profile.ended()  # after a signal there may be no time for a long trace: the checkpoint is first
    failure = _failure(session, stop) if reason == "signal" else None
    log.finished(run, _named(reason, stop, failure), session.work(whole=True))
    if failure is not None:
        raise failure


def _failure(session: Session, stop: StopRequest) -> UserError | TrainingError | None:
    """The error to end with after a stop, or None; the same on every rank."""
    failure = agreement.first_said(stop.failure, session.ranks.device)
    return failure if session.is_saved() else _lost(failure)


def _lost(failure: UserError | TrainingError | None) -> UserError:
    """The error of a run whose last checkpoint could not be written; failure: what ended it."""
    lost = "what was trained since the last checkpoint is lost, because none can be written"
    problem = lost if failure is None else f"{lost}; and {getattr(failure, 'problem', failure)}"
    return UserError(problem, "free disk space, or pass another --output_dir")


def _named(reason: str, stop: StopRequest, failure: Exception | None) -> str:
    """Why training ended, in words."""
    if failure is not None:
        return "an error"
    return reason if reason != "signal" else f"signal {stop.received or 'to a rank'}"


def _step_figures(
    session: Session, names: Sequence[str], result: UpdateResult, step: int
) -> dict[str, float]:
    """The figures of a step over all ranks. names: of the losses."""
    losses = LossMeans.of(names, result.sums)
    return {
        "loss": losses.loss,
        "mlm_acc": losses.accuracy["mlm"],
        "grad_norm": result.gradient_norm,
        "loss_scale": result.loss_scale,
        "learning_rate": session.schedule(step - 1),  # the rate that this step's update used
    }
