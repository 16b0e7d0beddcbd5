"""The composition root: turns a configuration into the objects of a run. Every choice by name is made here."""

from vamo_ft.assemble.export import copy_model, merge_model, rebuild_model
from vamo_ft.assemble.run import Run, build_run, evaluate_model
from vamo_ft.assemble.surroundings import Surroundings

__all__ = ["Run", "Surroundings", "build_run", "copy_model", "evaluate_model", "merge_model", "rebuild_model"]
