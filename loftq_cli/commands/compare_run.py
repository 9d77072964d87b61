"""Makes, loads, measures and trains every method of a comparison, one after the other."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli import schema
from loftq_cli.commands.compare_plan import Texts
from loftq_cli.commands.loaded import choose
from loftq_cli.commands.run import Run
from loftq_cli.errors import InvalidSetting, LoftqError
from loftq_cli.options import CompareOptions, items
from loftq_cli.record import Listener, Progress, Record
from loftq_cli.report.start_verdict import Key, key, relative_to_qlora, verdict

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.engines.report_file import Report
    from loftq_cli.engines.settings import Settings
    from loftq_cli.models.evaluation import Evaluation
    from loftq_cli.models.finetuning import Trained
    from loftq_cli.models.loading import LoadedModel


class Bench:
    """The original model with its texts, and what every method is put through beside it."""

    def __init__(self, run: Run, asked: CompareOptions, texts: Texts) -> None:
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

        self.run, self.texts, self.asked = run, texts, asked
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
        self._require_possible(planned)
        found: list[schema.ComparedMethod] = []
        losses: dict[Key, Sequence[float]] = {}
        with run.progress("comparing", len(planned) + 1) as progress:
            progress.start("the original")
            found.append(self._measure_original())
            progress.advance()
            for settings in planned:
                name = f"{settings.init}, {settings.bits} bits, rank {settings.rank}"
                progress.start(name)
                method, after = self._measure(settings, name, progress)
                found.append(method)
                if after is not None:
                    losses[key(method)] = after.window_losses
                progress.advance(name)
        found = relative_to_qlora(found)
        return schema.CompareResults(
            architecture=self.architecture.class_name,
            base_parameters=self.original.model.num_parameters(),
            settings=self._settings(planned),
            methods=found,
            verdict=verdict(found, losses),
        )

    def _require_possible(self, planned: Sequence[Settings]) -> None:
        """Refuses what some method would be refused for, before the first is made."""
        from loftq_cli.checkpoint.index import open_checkpoint
        from loftq_cli.engines.plan import make_plan

        inventory = self.architecture.inventory(open_checkpoint(self.directory).infos)
        for settings in planned:
            try:
                make_plan(inventory, settings)
            except InvalidSetting as error:
                if error.hint:
                    error.hint = error.hint.replace("--rank ", "--ranks ")
                raise

    def _measure_original(self) -> schema.ComparedMethod:
        from loftq_cli.checkpoint.index import open_checkpoint
        from loftq_cli.models.evaluation import evaluate, finite

        with self.run.timing("evaluate"):
            evaluation = evaluate(self.original.model, self.heldout, self.reference)
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
        )

    def _measure(
        self, settings: Settings, name: str, progress: Progress
    ) -> tuple[schema.ComparedMethod, Evaluation | None]:
        """One method, and what it makes of the held-out text after training."""
        from loftq_cli.models.evaluation import evaluate

        with tempfile.TemporaryDirectory(prefix="loftq-compare-") as scratch:
            output = Path(scratch) / "method"
            with self.run.timing("quantize"):
                totals = self._make(output, settings).results.totals
            with self.run.timing("evaluate"):
                evaluation = evaluate(self._load(output).model, self.heldout, self.reference)
            trained = self._train(output, name, progress)
        gc.collect()  # models and trainers hold each other
        if not math.isfinite(evaluation.kl_divergence or 0.0):
            self.run.warn(f"{name}: what it predicts is no number, or rules out what comes")
        after = None if trained is None else trained.after
        return _method(settings, totals, evaluation, trained), after

    def _make(self, output: Path, settings: Settings) -> Report:
        """The files of one method, as `quantize` writes them."""
        from loftq_cli.engines.job import Job, make_directory

        job = Job(
            model=str(self.directory),
            output=output,
            settings=settings,
            device=self.device,
            calibration_text=self.texts.calibration if settings.start.needs_moments else None,
            trust_remote_code=self.asked.trust_remote_code,
        )
        record = Record("quantize", ["loftq", "quantize"], _Warnings(self.run))
        return make_directory(job, record).document

    def _load(self, directory: Path) -> LoadedModel:
        from loftq_cli.models.loading import load_model

        return load_model(
            directory,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.asked.trust_remote_code,
        )

    def _train(self, output: Path, name: str, progress: Progress) -> Trained | None:
        from loftq_cli.models.finetuning import TrainingDiverged, finetune

        schedule = self.texts.schedule(self.asked.seed)
        if schedule is None:
            return None
        assert self.training is not None

        def tell(step: int) -> None:
            progress.start(f"{name}, step {step} of {schedule.steps}")

        # On a GPU the original makes room for what training holds.
        self.original.model.to("cpu")
        try:
            with self.run.timing("train"):
                # Loaded anew: what was evaluated may not pass gradients any more.
                return finetune(
                    self._load(output).model, self.training, self.heldout, schedule, tell
                )
        except TrainingDiverged as error:
            self.run.warn(f"{name}: {error.what}" + (f" ({error.hint})" if error.hint else ""))
            return None
        finally:
            self.original.model.to(self.device)

    def _settings(self, planned: Sequence[Settings]) -> schema.CompareSettings:
        from loftq_cli.models.finetuning import BATCH

        texts, asked = self.texts, self.asked
        evaluation, calibration, training = texts.names
        schedule = texts.schedule(asked.seed)
        count, length = self.heldout.shape
        calibrated = any(each.calibration for each in planned)
        return schema.CompareSettings.model_validate(
            {
                **vars(asked),
                "text": evaluation,
                "calibration_text": calibration if calibrated else None,
                "train_text": training,
                "predicted_tokens": count * (length - 1),
                "window_tokens": length,
                "target_modules": items(asked.target_modules, "--target-modules"),
                "batch_windows": None if schedule is None else BATCH,
                "learning_rate": None if schedule is None else schedule.learning_rate,
                "warmup_steps": None if schedule is None else schedule.warmup_steps,
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
    trained: Trained | None,
) -> schema.ComparedMethod:
    from loftq_cli.models.evaluation import finite

    assert totals.stored_bits is not None
    return schema.ComparedMethod(
        init=settings.init,
        bits=settings.bits if settings.container.quantizes else round(totals.stored_bits),
        stored_bits=totals.stored_bits,
        rank=settings.rank,
        weight_error_relative=totals.weight_error_relative,
        kl_divergence=finite(evaluation.kl_divergence),
        perplexity=finite(evaluation.perplexity),
        backbone_bytes=totals.output_bytes,
        adapter_bytes=totals.adapter_bytes,
        trainable_parameters=totals.trainable_parameters,
        seconds=totals.seconds or 0.0,
        heldout_loss_before=None if trained is None else finite(trained.before.loss),
        heldout_loss_after=None if trained is None else finite(trained.after.loss),
        train_seconds=None if trained is None else trained.seconds,
        loss_curve=[] if trained is None else trained.curve,
    )
