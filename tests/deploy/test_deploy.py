"""The files in `deploy/`: pinned images, nothing published beyond this machine, and fields that Kubernetes knows."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PINNED = re.compile(r"[a-z0-9./-]+:v?\d+\.\d+[a-z0-9.-]*")


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def compose_services() -> dict[str, dict[str, Any]]:
    return load("compose.yaml")["services"]


def images() -> Iterator[str]:
    yield from (service["image"] for service in compose_services().values())
    yield load("kubernetes/compute-job.yaml")["spec"]["template"]["spec"]["containers"][0]["image"]
    for image in (
        load("kubernetes/dagster-values.yaml")["dagster-user-deployments"]["deployments"][0]["image"],
        load("kubernetes/ray-values.yaml")["image"],
    ):
        yield f"{image['repository']}:{image['tag']}"
    yield re.search(r"^FROM (\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)[1]  # type: ignore[index]


def test_images_are_pinned_to_versions() -> None:
    assert [image for image in images() if not PINNED.fullmatch(image)] == []


def test_compose_publishes_on_this_machine_only() -> None:
    ports = [port for service in compose_services().values() for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_files_that_compose_mounts_and_the_image_copies_are_there() -> None:
    mounts = {volume.split(":")[0] for service in compose_services().values() for volume in service["volumes"]}
    named = {mount for mount in mounts if mount.startswith(".")}
    missing = {mount for mount in named if not (DEPLOY / mount).is_file()}
    assert missing == {"./compose/project.yaml"}  # the user's own
    copied = re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert [name for line in copied for name in line.split() if not (ROOT / name).exists()] == []


def test_compose_uses_the_storage_that_is_documented() -> None:
    block = re.search(r"```yaml\n(storage:\n.*?)```", (ROOT / "docs/operations.md").read_text(), re.DOTALL)
    assert block is not None
    assert load("compose/dagster.yaml")["storage"] == yaml.safe_load(block[1])["storage"]
    names = {
        entry["env"]
        for entry in load("compose/dagster.yaml")["storage"]["postgres"]["postgres_db"].values()
        if isinstance(entry, dict)
    }
    assert names <= compose_services()["code"]["environment"].keys()


def pod(container: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Return a pod with fields of a chart's values."""
    kept = {name: spec[name] for name in ("nodeSelector", "tolerations", "volumes") if name in spec}
    fields = ("env", "envFrom", "resources", "volumeMounts")
    own = {name: container[name] for name in fields if name in container}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "tested"},
        "spec": {"containers": [{"name": "tested", "image": "tested:1.0", **own}], **kept},
    }


def manifests() -> Iterator[dict[str, Any]]:
    yield load("kubernetes/compute-job.yaml")
    ray = load("kubernetes/ray-values.yaml")
    for part in (ray["head"], ray["worker"]):
        yield pod({**part, "env": part["containerEnv"]}, part)
    values = load("kubernetes/dagster-values.yaml")
    (deployment,) = values["dagster-user-deployments"]["deployments"]
    secrets = [{"secretRef": secret} for secret in deployment["envSecrets"]]
    yield pod({**deployment, "envFrom": secrets}, deployment)
    run = values["runLauncher"]["config"]["k8sRunLauncher"]["runK8sConfig"]
    yield pod(run["containerConfig"], run["podSpecConfig"])


def test_kubernetes_knows_every_field() -> None:
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed: pip install kubernetes-validate"
    )
    for manifest in manifests():
        validator.validate(manifest, validator.latest_version(), strict=True)
    broken = next(manifests())
    broken["spec"]["template"]["spec"]["nodeSelectors"] = {}
    with pytest.raises(validator.ValidationError):
        validator.validate(broken, validator.latest_version(), strict=True)


def test_the_values_fit_the_chart_of_dagster() -> None:
    chart = os.environ.get("CLIP_SELECTION_DAGSTER_CHART")
    if chart is None:
        pytest.skip("CLIP_SELECTION_DAGSTER_CHART does not name the folder of Dagster's Helm chart")
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads((Path(chart) / "values.schema.json").read_text())
    values = merged(yaml.safe_load((Path(chart) / "values.yaml").read_text()), load("kubernetes/dagster-values.yaml"))
    jsonschema.validate(values, schema)


def test_the_rendered_ray_cluster_asks_for_no_more_than_its_limits() -> None:
    """The chart's own limits stay where the values have none, and Kubernetes refuses a request above a limit."""
    chart, helm = os.environ.get("CLIP_SELECTION_KUBERAY_CHART"), shutil.which("helm")
    if chart is None or helm is None:
        pytest.skip("no helm, or CLIP_SELECTION_KUBERAY_CHART does not name the folder of KubeRay's chart ray-cluster")
    values = DEPLOY / "kubernetes/ray-values.yaml"
    rendered = subprocess.run(
        [helm, "template", "ray", chart, "-f", values], capture_output=True, check=True, text=True
    )
    spec = yaml.safe_load(rendered.stdout)["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        resources = container["resources"]
        assert {name: resources["limits"][name] for name in resources["requests"]} == resources["requests"]


def merged(below: Any, above: Any) -> Any:
    """Merge values as Helm does: mappings by key, everything else replaced."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: merged(below.get(key), value) for key, value in above.items()}}
