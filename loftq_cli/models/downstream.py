"""Scores of a model on tasks of EleutherAI's lm-eval, as its own command line gives them.

Few-shot examples, seeds, standard errors and a batch of one are lm-eval's own defaults, so that
`lm_eval --model hf` on the same weights in the same dtype gives the same figures. The model is
asked as it lies in memory. The calls are those of lm-eval 0.4.13.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loftq_cli.errors import LoftqError, UsageError, first_line, told_as
from loftq_cli.models.evaluation import finite
from loftq_cli.schema import DownstreamTask, TaskScore

_SUFFIXES = (".yaml", ".yml")


class Downstream:
    """Tasks with their questions, which one model after the other is asked."""

    def __init__(self, names: Sequence[str]) -> None:
        """Finds the tasks by lm-eval's names of them, or the paths of files; loads their questions.

        A file, as lm-eval itself, may name Python code beside it, which is run.

        Raises:
            UsageError: lm-eval is not installed, or has no such task, or one is there twice.
            LoftqError: a task's file is broken, or its questions are not to be had.
        """
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UsageError(
                "--tasks needs lm-eval",
                cause=first_line(error),
                hint="pip install 'loftq[eval]'",
            ) from error
        are_files = [_is_file(name) for name in names]
        # The index of lm-eval's own tasks, 15,000 of them, takes as long as anything here.
        manager = TaskManager(include_defaults=not all(are_files))
        found: list[Any] = []
        for name, is_file in zip(names, are_files, strict=True):
            if not is_file:
                _require_known(name, manager.all_tasks)
            with told_as(LoftqError, f"the task {name} cannot be loaded", hint=_hint(is_file)):
                loaded = manager.load([name])
            groups = list(loaded.get("groups", {}).values())
            # The group that was asked for comes before those within it.
            found += groups[:1] or loaded["tasks"].values()
        # A group without a score of its own is its tasks.
        self._shown: dict[str, Sequence[Any]] = {}
        names_seen: set[str] = set()
        for each in found:
            members = each.get_all_tasks() if hasattr(each, "get_all_tasks") else [each]
            for task in members:
                if task.task_name in names_seen:
                    raise UsageError(f"--tasks has the task {task.task_name} twice")
                names_seen.add(task.task_name)
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
            if getattr(each, "has_aggregation", False):
                self._shown[each.name] = members
            else:
                self._shown |= {task.task_name: [task] for task in members}
        self._loaded: Any = manager.load(found)

    @property
    def tasks(self) -> list[DownstreamTask]:
        """What is asked: a document's words for it."""
        return [self._described(name, members) for name, members in self._shown.items()]

    def scores(self, model: Any, tokenizer: Any) -> list[TaskScore]:
        """Asks a model, which is left in evaluation mode.

        Raises:
            LoftqError: lm-eval cannot ask it.
        """
        import numpy
        import torch
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.evaluator import evaluate

        random.seed(DEFAULT_RANDOM_SEED)
        numpy.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        with told_as(LoftqError, f"lm-eval fails on {', '.join(self._shown)}"):
            found = evaluate(lm=_asked(model, tokenizer), task_dict=self._loaded, log_samples=False)
        # Those of groups are in "results" too.
        return [
            score
            for name in self._shown
            for score in _scores(name, found["results"][name], found["higher_is_better"][name])
        ]

    def _described(self, name: str, members: Sequence[Any]) -> DownstreamTask:
        group = self._loaded.get("groups", {}).get(name)
        shots = {int(each.get_config("num_fewshot")) for each in members}
        return DownstreamTask(
            name=name,
            version=str(members[0].VERSION if group is None else group.version),
            shots=shots.pop() if len(shots) == 1 else None,
            questions=sum(len(each.eval_docs) for each in members),
        )


def _is_file(name: str) -> bool:
    path = Path(name)
    if path.is_file():
        return True
    if path.suffix in _SUFFIXES:
        raise UsageError(f"--tasks: there is no file {name}")
    return False


def _require_known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise UsageError(
            f"lm-eval has no task called {name!r:.80}",
            cause=f"the nearest that it has: {', '.join(near)}" if near else None,
            hint="`lm_eval ls tasks` lists them; a file of your own is named by its path, with "
            ".yaml",
        )


def _hint(is_file: bool) -> str:
    if is_file:
        return "try it alone: lm_eval validate --tasks FILE"
    return "lm-eval loads the questions from the hub, unless they are in the cache already"


def _asked(model: Any, tokenizer: Any) -> Any:
    """lm-eval's view of a model in memory, which says nothing while it works."""
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    return Quiet(pretrained=model, tokenizer=tokenizer, batch_size=1)


def _scores(name: str, values: dict[str, Any], higher: dict[str, Any]) -> list[TaskScore]:
    """lm-eval's `"acc,none": 0.72, "acc_stderr,none": 0.03` by parts."""
    found = []
    for key, value in values.items():
        metric, comma, passed = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            found.append(
                TaskScore(
                    task=name,
                    metric=metric,
                    filter=None if passed == "none" else passed,
                    value=_number(value),
                    standard_error=_number(values.get(f"{metric}_stderr,{passed}")),
                    higher_is_better=higher.get(metric),
                )
            )
    return found


def _number(value: Any) -> float | None:
    """None for what lm-eval writes as "N/A", and for what is no number."""
    try:
        return finite(float(value))
    except (TypeError, ValueError):
        return None
