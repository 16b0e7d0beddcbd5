"""The composition root: turns a configuration into the objects of a run. Every choice by name is made here."""

from vamo_ft.assemble.card import build_card
from vamo_ft.assemble.evaluation import evaluate_model
from vamo_ft.assemble.export import Packaging, copy_model, merge_model, rebuild_model
from vamo_ft.assemble.generation import build_answerer
from vamo_ft.assemble.recovery import train_run
from vamo_ft.assemble.run import Run, build_run
from vamo_ft.assemble.subject import Subject, build_subject
from vamo_ft.assemble.surroundings import RunSurroundings, Surroundings
from vamo_ft.assemble.trackers import build_trackers
from vamo_ft.models.harness import TaskScore, run_tasks
from vamo_ft.models.hub import check_push, push_folder

__all__ = [
    "Packaging",
    "Run",
    "RunSurroundings",
    "Subject",
    "Surroundings",
    "TaskScore",
    "build_answerer",
    "build_card",
    "build_run",
    "build_subject",
    "build_trackers",
    "check_push",
    "copy_model",
    "evaluate_model",
    "merge_model",
    "push_folder",
    "rebuild_model",
    "run_tasks",
    "train_run",
]
