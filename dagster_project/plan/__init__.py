"""`clip-select plan`: the missing and stale files of a project, and the time and space that computing them takes.

`work` lists them by the same questions that a pass asks; `sizes` counts rows and bytes; `recorded` reads rates from
Dagster's events, and `calibration` measures those that are missing; `estimates` joins them; `report` prints.
"""
