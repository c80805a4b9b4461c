"""The job `plan`: the estimate of `clip-select plan`, on the page of its run in Dagster's UI."""

from dataclasses import replace

import dagster as dg

from assets.base.context import Context
from assets.graph import Graph
from dagster_project.plan.report import COLUMNS, document, make_plan, rows, totals


def plan_job(project: Context, graph: Graph) -> dg.JobDefinition:
    """Return the job of a project. It computes nothing; what has no recorded rate yet is measured for ten seconds."""

    @dg.op(pool="gpu", required_resource_keys={"lake", "pool", "models", "engine"}, out=dg.Out(dg.Nothing))
    def estimate(context: dg.OpExecutionContext) -> None:
        """Estimate what is missing or stale."""
        resources = context.resources
        opened = replace(project, lake=resources.lake, pool=resources.pool, models=resources.models)
        found = make_plan(opened, graph, context.instance, resources.engine)
        lines = totals(found)
        for line in lines:
            context.log.info(line)
        cells = [[str(row.get(column) or "") for column in COLUMNS] for row in rows(found)]
        table = [COLUMNS, ["---"] * len(COLUMNS), *cells]
        text = "\n".join(f"| {' | '.join(each.replace('|', chr(92) + '|') for each in row)} |" for row in table)
        context.add_output_metadata(
            {
                "assets": dg.MetadataValue.md(text),
                "totals": dg.MetadataValue.md("\n\n".join(lines)),
                "plan": dg.MetadataValue.json(document(found)),
                **({"seconds": found.total("seconds")} if found.due else {}),
            }
        )

    @dg.job(
        name="plan",
        description="Estimate what is missing or stale: rows, bytes, operations, disk space and time. "
        "Computes nothing; the result is the metadata of the step's output, on the page of the run.",
    )
    def job() -> None:
        estimate()

    return job
