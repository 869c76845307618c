"""Whole-system load programs: a figure is claimed only where a program here measures it beside its peer."""
