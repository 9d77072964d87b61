"""Makes, loads, measures and trains every method of a comparison, one after the other."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli import schema
from loftq_cli.commands.compare_fit import grid_named, grid_of, possible
from loftq_cli.commands.compare_plan import Texts, TrainingPlan
from loftq_cli.commands.compare_train import Contest, Trainee, Trials, described, forecast
from loftq_cli.commands.loaded import choose
from loftq_cli.commands.run import Run
from loftq_cli.engines.settings import Settings
from loftq_cli.errors import LoftqError
from loftq_cli.options import CompareOptions, block_sizes, items
from loftq_cli.record import Listener, Progress, Record
from loftq_cli.report.start_verdict import Key, key, relative_to_qlora, verdict
from loftq_cli.report.task_verdict import with_tasks

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.models.downstream import Downstream
    from loftq_cli.models.evaluation import Evaluation
    from loftq_cli.models.loading import LoadedModel


class Bench:
    """The original model with its texts, and what every method is put through beside it."""

    def __init__(
        self,
        run: Run,
        asked: CompareOptions,
        texts: Texts,
        plan: TrainingPlan | None,
        downstream: Downstream | None = None,
    ) -> None:
        """Loads the original.

        Raises:
            UnsupportedModel: it is no causal language model.
            AlreadyQuantized: there is no original in this directory.
            InvalidSetting: a text is too short.
        """
        from loftq_cli.models.architecture import read_architecture
        from loftq_cli.models.evaluation import MOST_TOKENS, Reference, require_causal
        from loftq_cli.models.source import read_config, refuse_quantized
        from loftq_cli.models.spec import resolve_model
        from loftq_cli.models.texts import read_text, text_windows

        self.run, self.texts, self.asked, self.downstream = run, texts, asked, downstream
        self.trials = None if plan is None else Trials(plan)
        with run.timing("resolve", "finding the model"):
            found = resolve_model(asked.model, with_code=asked.trust_remote_code)
        self.directory = found.directory
        self.identity = found.identity
        config = read_config(found.directory)
        refuse_quantized(found.directory, config)
        where = choose(run, config, asked.device, asked.dtype, to_measure=True)
        self.device, self.dtype = where.device, where.dtype
        with run.timing("read", "reading the model"):
            self.architecture = read_architecture(
                found.directory, config, trust_remote_code=asked.trust_remote_code
            )
            require_causal(self.architecture)
            self.original = self._load(found.directory)
            # Texts before work: one that is too short is found out now.
            self.heldout = text_windows(
                self.original, read_text(texts.evaluation), str(texts.evaluation), MOST_TOKENS
            )
            self.training: Tensor | None = None
            if texts.training is not None:
                self.training = text_windows(
                    self.original, read_text(texts.training), str(texts.training)
                )
            self.reference = Reference(self.original.model, self.heldout)

    def compare(self, planned: Sequence[Settings]) -> schema.CompareResults:
        """The original and every planned method, with the verdict."""
        run = self.run
        planned = possible(run, self.directory, self.architecture, self.asked, planned)
        several = len({grid_named(each) for each in planned if each.container.quantizes}) > 1
        found: list[schema.ComparedMethod] = []
        losses: dict[Key, Sequence[float]] = {}
        with run.progress("comparing", len(planned) + 1) as progress:
            progress.start("the original")
            found.append(self._measure_original())
            progress.advance()
            if self.trials is not None:
                heldout = len(self.heldout), self._forward_seconds
                run.note(forecast(self.trials.plan, len(planned), *heldout))
            for each in planned:
                bits = f"{each.bits} bits"
                if several and each.container.quantizes:
                    bits = grid_named(each)
                name = f"{each.init}, {bits}, rank {each.rank}"
                progress.start(name)
                method, contest = self._measure(each, name, progress)
                found.append(method)
                if contest is not None and contest.window_losses is not None:
                    losses[key(method)] = contest.window_losses
                progress.advance(name)
        found = relative_to_qlora(found)
        settings = self._settings(planned)
        return schema.CompareResults(
            architecture=self.architecture.class_name,
            base_parameters=self.original.model.num_parameters(),
            settings=settings,
            methods=found,
            verdict=with_tasks(verdict(found, losses, settings.training), found),
        )

    def _measure_original(self) -> schema.ComparedMethod:
        from loftq_cli.checkpoint.index import open_checkpoint
        from loftq_cli.models.evaluation import evaluate, finite

        began = time.perf_counter()
        with self.run.timing("evaluate"):
            evaluation = evaluate(self.original.model, self.heldout, self.reference)
        self._forward_seconds = time.perf_counter() - began
        if not math.isfinite(evaluation.kl_divergence or 0.0):
            raise LoftqError(
                f"what {self.identity.id} predicts on {self.texts.evaluation} is no number",
                cause=f"a weight is NaN or infinite, or activations overflow {self.dtype}",
                hint="nothing can be measured against it: download the model again, or choose "
                "another --dtype",
            )
        tensors = open_checkpoint(self.directory).infos
        nbytes = sum(info.nbytes for info in tensors)
        stored_bits = 8 * nbytes / sum(info.elements for info in tensors)
        return schema.ComparedMethod(
            init="original",
            bits=round(stored_bits),
            stored_bits=stored_bits,
            rank=None,
            weight_error_relative=0.0,
            kl_divergence=evaluation.kl_divergence,
            perplexity=finite(evaluation.perplexity),
            backbone_bytes=nbytes,
            adapter_bytes=0,
            trainable_parameters=0,
            seconds=0.0,
            scores=self._scores(self.original.model),
        )

    def _measure(
        self, settings: Settings, name: str, progress: Progress
    ) -> tuple[schema.ComparedMethod, Contest | None]:
        """One method: its files, what it makes of the held-out text, and its fine-tunes."""
        from loftq_cli.models.evaluation import evaluate

        def tell(doing: str) -> None:
            progress.start(f"{name}, {doing}")

        with self._made(settings) as (output, totals):
            model = self._load(output).model
            with self.run.timing("evaluate"):
                evaluation = evaluate(model, self.heldout, self.reference)
            scored = {"scores": self._scores(model, tell)}
            del model
            if not math.isfinite(evaluation.kl_divergence or 0.0):
                self.run.warn(f"{name}: what it predicts is no number, or rules out what comes")
            if self.trials is None:
                return _method(settings, totals, evaluation, **scored), None
            if not math.isfinite(evaluation.loss):
                self.run.warn(f"{name}: there is nothing to train")
                return _method(settings, totals, evaluation, **scored), None
            with self._training(output) as trainee:
                contest = self.trials.search(trainee, evaluation, tell)
                if contest.rate is not None:
                    scored["trained_scores"] = self._scores(trainee.model, tell)
            del trainee  # one model is trained at a time
        for seed in self.trials.plan.seeds[1:] if contest.rate is not None else ():
            # Made anew: a seed decides the adapter's random part too.
            with self._made(replace(settings, seed=seed)) as (output, _):
                with self.run.timing("evaluate"):
                    before = evaluate(self._load(output).model, self.heldout)
                with self._training(output) as trainee:
                    self.trials.repeat(contest, seed, trainee, before, tell)
                del trainee
        if contest.complaint is not None:
            self.run.warn(f"{name}: {contest.complaint}")
        return _method(settings, totals, evaluation, **contest.fields(), **scored), contest

    def _scores(
        self, model: Any, tell: Callable[[str], None] = lambda doing: None
    ) -> list[schema.TaskScore]:
        """What the model makes of the tasks, if there are any."""
        if self.downstream is None:
            return []
        tell("asked by lm-eval")
        with self.run.timing("tasks"):
            return self.downstream.scores(model, self.original.tokenizer)

    @contextmanager
    def _made(self, settings: Settings) -> Iterator[tuple[Path, schema.QuantizeTotals]]:
        """The files of one method, as `quantize` writes them."""
        from loftq_cli.engines.job import Job, make_directory

        with tempfile.TemporaryDirectory(prefix="loftq-compare-") as scratch:
            job = Job(
                model=str(self.directory),
                output=Path(scratch) / "method",
                settings=settings,
                device=self.device,
                calibration_text=self.texts.calibration if settings.start.needs_moments else None,
                trust_remote_code=self.asked.trust_remote_code,
            )
            record = Record("quantize", ["loftq", "quantize"], _Warnings(self.run))
            with self.run.timing("quantize"):
                totals = make_directory(job, record).document.results.totals
            yield job.output, totals
        gc.collect()  # models and trainers hold each other

    @contextmanager
    def _training(self, output: Path) -> Iterator[Trainee]:
        assert self.training is not None
        # On a GPU the original makes room for what training holds.
        self.original.model.to("cpu")
        try:
            with self.run.timing("train"):
                # Loaded anew: what was evaluated may not pass gradients any more.
                yield Trainee(self._load(output).model, self.training, self.heldout)
        finally:
            self.original.model.to(self.device)

    def _load(self, directory: Path) -> LoadedModel:
        from loftq_cli.models.loading import load_model

        return load_model(
            directory,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.asked.trust_remote_code,
        )

    def _settings(self, planned: Sequence[Settings]) -> schema.CompareSettings:
        texts, asked = self.texts, self.asked
        evaluation, calibration, training = texts.names
        count, length = self.heldout.shape
        containers, sizes = items(asked.container, "--container"), block_sizes(asked.block_size)
        calibrated = any(each.calibration for each in planned)
        how = {}
        if self.trials is not None:
            how = described(self.trials.plan, on_cpu=self.device == "cpu")
        return schema.CompareSettings.model_validate(
            {
                **vars(asked),
                "text": evaluation,
                "calibration_text": calibration if calibrated else None,
                "train_text": training,
                "predicted_tokens": count * (length - 1),
                "window_tokens": length,
                "container": containers[0],
                "containers": containers,
                "block_size": sizes[0],
                "block_sizes": sizes,
                "experts": None if asked.experts is None else items(asked.experts, "--experts"),
                "target_modules": items(asked.target_modules, "--target-modules"),
                "tasks": [] if self.downstream is None else self.downstream.tasks,
                **how,
            }
        )


class _Warnings(Listener):
    """Of a `quantize` run inside a comparison only warnings are heard."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def warn(self, text: str) -> None:
        self._run.warn(text)


def _method(
    settings: Settings,
    totals: schema.QuantizeTotals,
    evaluation: Evaluation,
    **found: Any,
) -> schema.ComparedMethod:
    """``found`` is what came of training and of tasks."""
    from loftq_cli.models.evaluation import finite

    assert totals.stored_bits is not None
    return schema.ComparedMethod(
        init=settings.init,
        bits=settings.bits if settings.container.quantizes else round(totals.stored_bits),
        stored_bits=totals.stored_bits,
        **grid_of(settings),
        rank=settings.rank,
        weight_error_relative=totals.weight_error_relative,
        kl_divergence=finite(evaluation.kl_divergence),
        perplexity=finite(evaluation.perplexity),
        backbone_bytes=totals.output_bytes,
        adapter_bytes=totals.adapter_bytes,
        trainable_parameters=totals.trainable_parameters,
        seconds=totals.seconds or 0.0,
        **found,
    )
