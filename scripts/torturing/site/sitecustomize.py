"""Python runs this when it starts, before `vamo_ft`: it can then be asked what it is doing."""

from scripts.torturing.places import watch_as_told

watch_as_told()
