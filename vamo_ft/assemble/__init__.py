"""The composition root: turns a configuration into the objects of a run. Every choice by name is made here."""

from vamo_ft.assemble.export import copy_model, merge_model, rebuild_model
from vamo_ft.assemble.generation import build_answerer
from vamo_ft.assemble.recovery import train_run
from vamo_ft.assemble.run import Run, build_run, evaluate_model
from vamo_ft.assemble.subject import Subject, build_subject
from vamo_ft.assemble.surroundings import RunSurroundings, Surroundings

__all__ = [
    "Run",
    "RunSurroundings",
    "Subject",
    "Surroundings",
    "build_answerer",
    "build_run",
    "build_subject",
    "copy_model",
    "evaluate_model",
    "merge_model",
    "rebuild_model",
    "train_run",
]
