"""One training run on one rank, top to bottom: set up, evaluate, loop, report."""

from __future__ import annotations

import dataclasses
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
from bert_pretraining.runtime import arithmetic, output, process_group, rank_reports
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.runtime.signals import StopRequest
from bert_pretraining.training.outcomes import UpdateResult
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
        paths = data_paths(config)
        if config.deterministic:
            arithmetic.use_deterministic_operators(config.device)
        ranks = process_group.start(config.device, config.dist_backend, dataclasses.asdict(config))
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
            session = Session(config, paths, ranks, log, run)
            session.start_the_clock()
            reason = train(session, stop)
        except BaseException as error:
            # The process group stays as it is: to leave it now would make the other ranks
            # fail, and report it, before this one has reported the cause.
            log.aborted(run)
            if session is None and isinstance(error, UserError):
                log.discard()
            raise
        finally:
            log.close()
    if config.report and ranks.is_main:
        print(report_on(log.folder), flush=True)
    if stop.failure is not None:  # too late to matter: the run had its end
        print(f"Warning: {stop.failure}", file=sys.stderr)
    if reason == "signal":
        return EXIT_STOPPED
    return EXIT_CONVERGED if run.converged else EXIT_NOT_CONVERGED


def _with_the_ranks_there_are(config: Config, ranks: Ranks) -> Config:
    """A launcher starts as many ranks as the configuration says; without one there is one rank."""
    if config.world_size == ranks.world_size:
        return config
    return dataclasses.replace(config, nnodes=1, nproc_per_node=ranks.world_size)


def train(session: Session, stop: StopRequest) -> str:
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
            first_sample = run.samples_seen
            if order.epoch(first_sample) != epoch:
                if epoch is not None:
                    log.epoch_ended(epoch)
                epoch = order.epoch(first_sample)
                log.epoch_began(epoch)

            # ---- forward, backward, reduction and the optimizer's step
            totals = update([next(batches) for _ in range(config.gradient_accumulation_steps)])
            rank_reports.heartbeat(updates=1)
            run.samples_seen += samples_per_step

            # ---- the host does not wait for the device until something may be due
            expected = run.after(outcomes.num_unread, samples_per_step)
            learn = outcomes.read if triggers.anything_due(*expected) else outcomes.look
            result = learn(run.global_steps, totals, stop.asked)
            if result is None:
                continue
            step = run.account(result.updates, result.skipped, result.last_finite, samples_per_step)
            if result.skipped:
                log.skipped(run, result.skipped, result.loss_scale)
            if step and triggers.replica_check_due(step):
                weights = dict(session.training.module.named_parameters())
                process_group.check_replicas(weights, run.global_steps)

            # ---- evaluate where due, and always after the last step
            evaluation = None
            if step:
                # The target may be met already, by the start weights: upstream counts them too.
                # The run then ends here, even if this evaluation finds a lower accuracy.
                reason = session.stop_reason()
                if reason or triggers.evaluation_due(step, run.num_trained_samples):
                    evaluation = session.evaluate()
                if reason != "target":
                    reason = session.stop_reason()
            if reason is None and result.stopping:
                reason = "signal"

            # ---- tell, and save
            figures = None
            if step and (triggers.logging_due(step) or evaluation):
                figures = {
                    **_step_figures(session, totals.names, result, step),
                    "epoch": epoch,
                    "end_training": reason is not None,
                    "iter_dataloader_idx": order.shard_ordinal(first_sample),
                }
            seconds = evaluation.seconds if evaluation else None
            log.steps(run, result.updates, samples_per_step, figures, seconds)
            saving = step and config.save_checkpoint and reason is None
            if saving and triggers.checkpoint_due(run.num_trained_samples):
                session.save()
            session.report_saved()

        batches.close()
        _end(session, stop, reason, epoch)
    return reason


def _end(session: Session, stop: StopRequest, reason: str, epoch: int | None) -> None:
    """Save, and tell the end. epoch: None for a run that had finished before."""
    run, log = session.run, session.log
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
    failure = _failure(session, stop) if reason == "signal" else None
    log.finished(run, _named(reason, stop, failure))
    if failure is not None:
        raise failure


def _failure(session: Session, stop: StopRequest) -> UserError | TrainingError | None:
    """The error to end with after a stop, or None; the same on every rank."""
    failure = next(filter(None, process_group.gather(stop.failure)), None)
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
        "learning_rate": session.schedule(step - 1),  # the rate that this step's update used
    }
