"""`python -m benchmarks.gpu --smoke` runs everything that a GPU will, on CPU, without the project's other packages."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.parts import FULL, LIMIT, MACHINE, SMOKE

ROOT = Path(__file__).resolve().parents[2]

# What a machine with torch, triton and open_clip need not have.
WITHOUT = """
import sys
for name in ("pyarrow", "pydantic", "duckdb", "dagster", "polars", "click", "rich"):
    sys.modules[name] = None
"""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the file of a smoke run."""
    pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(WITHOUT)
    path = folder / "results" / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--json", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(folder)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_every_part_ends_without_an_error(smoke: dict[str, Any]) -> None:
    assert smoke["finished"]
    assert smoke["smoke"]
    assert {name: entry["error"] for name, entry in smoke["parts"].items()} == dict.fromkeys(SMOKE)
    assert FULL.keys() - SMOKE.keys() == {"ViT-B-32"}


def test_the_file_names_the_machine_and_the_versions(smoke: dict[str, Any]) -> None:
    machine = smoke["machine"]
    assert {"torch", "triton", "open_clip_torch"} <= machine["packages"].keys()
    assert None not in (machine["packages"]["torch"], machine["packages"]["triton"], machine["cpu"])
    assert machine["gpu"] is None


def test_every_kernel_is_compared_with_float64_at_every_size(smoke: dict[str, Any]) -> None:
    results = smoke["parts"]["parity"]["results"]
    assert 0 < results["largest_error"] < 1e-6
    problems = {name: errors for name, errors in results.items() if isinstance(errors, dict)}
    assert len(problems) == len(SMOKE["parity"].sizes["problems"])
    for errors in problems.values():
        assert len(errors) == 6
        assert all(0 <= error <= results["largest_error"] for error in errors.values())


def test_speed_is_reported_for_kernels_tiles_scores_and_the_product(smoke: dict[str, Any]) -> None:
    for rates in smoke["parts"]["speed"]["results"].values():
        reductions = {"log_sum_exp", "log_sum_exp_both", "largest"}
        names = reductions | {f"tiles_{name}" for name in reductions} | {"neg_clip_loss", "norm_sim_inf", "product"}
        assert {f"{name}_tflops" for name in names} <= rates.keys()
        assert all(rate > 0 for rate in rates.values())


def test_every_listed_size_of_every_kernel_is_timed(smoke: dict[str, Any]) -> None:
    from selection.similarity.triton_reduction import ALTERNATIVES

    results = smoke["parts"]["tuning"]["results"]
    for kernel in ("log_sum_exp", "log_sum_exp_both", "largest"):
        labels = ["-".join(map(str, sizes)) for sizes in ALTERNATIVES]
        assert all(results[f"{kernel} {label}"] > 0 for label in labels)
        assert {results[f"{kernel} fastest"], results[f"{kernel} in use"]} <= set(labels)


def test_an_encoder_is_fed_by_a_decoding_process_from_jpeg_files_of_a_usual_size(smoke: dict[str, Any]) -> None:
    results = smoke["parts"]["ViT-L-14"]["results"]
    assert results["model"] == "tiny"
    assert results["decoding_processes"] == 1
    assert 15_000 < results["picture_bytes"] < 25_000
    rates = ("pairs_per_second", "bare_forward_pairs_per_second", "prepared_per_second_per_core")
    assert all(results[name] > 0 for name in (*rates, "of_bare_forward", "cores_that_keep_the_model_busy"))


def test_targets_stand_beside_their_values(smoke: dict[str, Any]) -> None:
    (pairs,) = (line for line in smoke["targets"] if line["result"] == "pairs_per_second")
    assert pairs["value"] == smoke["parts"]["ViT-L-14"]["results"]["pairs_per_second"]
    assert pairs["targets"] == [2300]


def test_the_targets_are_those_of_the_results_that_a_gpu_will_have() -> None:
    named = {(name, *path): targets for name, part in FULL.items() for path, targets in part.targets.items()}
    assert named[("speed", "d=768", "log_sum_exp_both_tflops")] == (600, 700)
    assert len([path for path in named if path[0] == "speed"]) == 6


def test_the_parts_fit_in_eight_minutes() -> None:
    assert MACHINE.limit + sum(part.limit for part in FULL.values()) <= LIMIT == 480


FAILING = """
import sys
from pathlib import Path
from benchmarks.gpu.parts import Part
from benchmarks.gpu.report import Report, measure

report = Report(Path(sys.argv[1]), smoke=True)
parts = {
    "wrong": Part("kernels", "parity", 600, {"problems": [(1, 1, 1, 0.0)]}),
    "slow": Part("kernels", "parity", 0, {"problems": []}),
    "good": Part("machine", "describe", 600),
}
measure(report, "cpu", parts)
assert report.failed() == ["wrong", "slow"]
"""


def test_a_part_that_fails_or_takes_too_long_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", FAILING, str(path)], cwd=ROOT, env=environment, check=True)
    found = json.loads(path.read_text())
    assert "ZeroDivisionError" in found["parts"]["wrong"]["error"]
    assert found["parts"]["slow"]["error"] == "ended at its time limit of 0 s"
    assert found["parts"]["good"]["results"]["packages"]
    assert found["finished"]


def test_without_a_gpu_nothing_is_measured_and_the_remedy_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--json", str(tmp_path / "gpu.json")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert "--smoke" in done.stderr
    assert json.loads((tmp_path / "gpu.json").read_text())["finished"] is False
