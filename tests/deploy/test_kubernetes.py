"""The manifests of deploy/kubernetes agree with Kubernetes' schemas, with the command line, and with one another."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cyclopts import App

from cli.commands import app
from cli.stopping import HURRY_SECONDS, STOP_SECONDS
from common.worker import worker_service
from router import server
from router.request_trace import INFERENCE

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in ROOT.glob("deploy/kubernetes/*/kustomization.yaml"))
OLDEST, NEWEST = "1.30", "1.37"  # releases of Kubernetes whose schemas must know every field

IMAGE_ENVIRONMENT = {"TWOSTROKE_MODEL": "/models/SmolLM2-135M-Instruct"}
KUBECTL = shutil.which("kubectl")

Document = dict[str, Any]


@dataclass(frozen=True)
class Pods:
    """A Deployment, what its one container runs, and the settings that this gives."""

    labels: dict[str, str]
    spec: Document
    container: Document
    command: str
    settings: Any

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @property
    def wait_seconds(self) -> int:
        """Of preStop."""
        sleep = self.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        assert sleep[0] == "sleep"
        return int(sleep[1])


def as_written(folder: Path) -> list[Document]:
    """What kustomize makes of a folder that only lists resources and generates secrets, but for the secrets' names."""
    told = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(told) <= {"apiVersion", "kind", "resources", "secretGenerator"}
    assert {*told["resources"], "kustomization.yaml"} == {path.name for path in folder.glob("*.yaml")}
    found = [document for name in told["resources"] for document in yaml.safe_load_all((folder / name).read_text())]
    for secret in told.get("secretGenerator", ()):
        data = dict.fromkeys(secret["files"], "")
        found.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret["name"]}, "data": data})
    return found


def built(folder: Path, copy: Path) -> list[Document]:
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    for secret in yaml.safe_load((copy / "kustomization.yaml").read_text()).get("secretGenerator", ()):
        for name in secret["files"]:
            (copy / name).write_text("0" * 64)
    return kustomize(copy)


def kustomize(folder: Path) -> list[Document]:
    command: list[str | Path] = [KUBECTL or "kubectl", "kustomize", folder]
    return list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


WAYS = [
    pytest.param(
        (folder, with_kubectl),
        id=f"{folder.name}-{'built' if with_kubectl else 'as-written'}",
        marks=pytest.mark.skipif(with_kubectl and KUBECTL is None, reason="there is no kubectl"),
    )
    for folder in FOLDERS
    for with_kubectl in (False, True)
]


@pytest.fixture(params=WAYS, scope="module")
def documents(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    folder, with_kubectl = request.param
    return built(folder, tmp_path_factory.mktemp(folder.name)) if with_kubectl else as_written(folder)


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def run_by_cli(container: Document) -> tuple[str, Any]:
    """The command and the settings of a container, as `twostroke` reads its arguments and environment."""
    command = container["args"][0]
    known: App = app[command]
    flags = {name for argument in known.assemble_argument_collection() for name in argument.names}
    environment = IMAGE_ENVIRONMENT | {variable["name"]: variable.get("value") for variable in container.get("env", ())}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("TWOSTROKE_")]:
            patch.delenv(name)
        for name, value in environment.items():
            if name.startswith("TWOSTROKE_"):
                assert f"--{name.removeprefix('TWOSTROKE_').replace('_', '-').lower()}" in flags, f"no setting: {name}"
                patch.setenv(name, value)
        _, bound, ignored = app.parse_args(container["args"], exit_on_error=False, print_error=False)
    assert not ignored
    # What is no flag of `serve` would be a command that it runs.
    assert set(bound.arguments) == {"config"}, bound.arguments
    return command, bound.arguments["config"]


@pytest.fixture
def pods(documents: list[Document]) -> list[Pods]:
    found = []
    for deployment in of_kind(documents, "Deployment"):
        template = deployment["spec"]["template"]
        (container,) = template["spec"]["containers"]
        found.append(Pods(template["metadata"]["labels"], template["spec"], container, *run_by_cli(container)))
    assert found
    return found


def selects(selector: Document, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    expressions = selector.get("matchExpressions", ())
    assert all(expression["operator"] == "In" for expression in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


def selected(selector: Document, pods: list[Pods]) -> list[Pods]:
    found = [pod for pod in pods if selects(selector, pod.labels)]
    assert found, f"{selector} selects nothing"
    return found


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_schemas_know_every_field(documents: list[Document], version: str) -> None:
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


def test_images_are_those_of_the_dockerfile_and_have_what_their_part_needs(pods: list[Pods]) -> None:
    targets = set(re.findall(r"^FROM \w+ AS (\w+)$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE))
    for pod in pods:
        name, _, tag = pod.container["image"].partition(":")
        assert name == "twostroke"
        assert tag in targets
        gpus = "nvidia.com/gpu" in pod.container["resources"]["limits"]
        assert tag == ("nixl" if getattr(pod.settings, "transport", None) == "nixl" else "cuda" if gpus else "cpu")


def test_ports_are_those_that_a_part_listens_at(pods: list[Pods]) -> None:
    for pod in pods:
        host, _, port = pod.settings.listen.rpartition(":")
        assert host == "0.0.0.0", "others must reach it, the kubelet first"
        assert pod.ports == {"grpc": int(port), "metrics": pod.settings.metrics_port}


def test_scrapers_are_told_the_port_of_metrics(documents: list[Document], pods: list[Pods]) -> None:
    for deployment, pod in zip(of_kind(documents, "Deployment"), pods, strict=True):
        annotations = deployment["spec"]["template"]["metadata"]["annotations"]
        assert annotations["prometheus.io/port"] == str(pod.ports["metrics"])


def test_probes_ask_what_tells_life_from_readiness(pods: list[Pods]) -> None:
    for pod in pods:
        probes = {kind: pod.container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
        assert {probe["grpc"]["port"] for probe in probes.values()} == {pod.ports["grpc"]}
        asked = {kind: probe["grpc"].get("service", "") for kind, probe in probes.items()}
        if pod.command in ("serve", "router"):
            # Without workers it is NOT_SERVING: tests/router/test_service.py. A restart would not bring any.
            assert asked["liveness"] == server.REGISTRY
            assert asked["readiness"] in ("", INFERENCE)
            assert asked["startup"] == ("" if pod.command == "serve" else server.REGISTRY)
            # Requests wait in the queue meanwhile.
            assert seconds(probes["readiness"]) == pod.settings.worker_grace
        else:
            assert set(asked.values()) <= {"", worker_service.SERVICE}
            assert seconds(probes["liveness"]) > 4 * worker_service.SILENT_SECONDS


def seconds(probe: Document) -> int:
    """How long it must fail."""
    return int(probe["periodSeconds"] * probe["failureThreshold"])


def test_kubernetes_waits_until_a_part_has_drained(pods: list[Pods]) -> None:
    for pod in pods:
        drain = pod.settings.drain_seconds
        if pod.command == "serve":  # first the router, then the workers
            stopping = 2 * (drain + STOP_SECONDS + HURRY_SECONDS)
        else:
            stopping = drain + max(server.LAST_WORDS_SECONDS, worker_service.LAST_WORDS_SECONDS + 1)
        assert pod.spec["terminationGracePeriodSeconds"] > pod.wait_seconds + stopping


def test_rollouts_wait_as_long_as_the_startup_probe(documents: list[Document]) -> None:
    for deployment in of_kind(documents, "Deployment"):
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert deployment["spec"].get("progressDeadlineSeconds", 600) > seconds(container["startupProbe"])


def test_pods_hold_to_the_restricted_standard(pods: list[Pods]) -> None:
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    for pod in pods:
        assert pod.spec["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": int(user[1]),
            "runAsGroup": int(user[2]),
            "fsGroup": int(user[2]),
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert pod.container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod.spec["automountServiceAccountToken"] is False
        assert pod.spec["enableServiceLinks"] is False
        assert "memory" in pod.container["resources"]["limits"]


def test_volumes_are_there_and_mounted(pods: list[Pods], documents: list[Document]) -> None:
    secrets = {secret["metadata"]["name"]: secret["data"] for secret in of_kind(documents, "Secret")}
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod.container["volumeMounts"]}
        assert len(mounts) == len(volumes)
        assert "/tmp" in mounts, "it is HOME"
        if not pod.settings.model.startswith("/"):
            assert "/hub" in mounts, "models come there"
        if (file := pod.settings.cluster_secret_file) is not None:
            assert file.name in secrets[mounts[str(file.parent)]["secret"]["secretName"]]
        for variable in pod.container.get("env", ()):
            assert "value" in variable or variable["valueFrom"]["secretKeyRef"]["optional"]


def test_each_worker_has_its_gpu(pods: list[Pods]) -> None:
    for pod in pods:
        if pod.command == "router":
            devices = set[str]()
        else:
            named = pod.settings.devices if pod.command == "serve" else (pod.settings.device,)
            devices = {device for device in named if device.startswith("cuda")}
        gpus = pod.container["resources"]["limits"].get("nvidia.com/gpu", 0)
        assert devices == {f"cuda:{index}" for index in range(gpus)}


def test_pools_of_a_cpu_fit_into_shared_memory(pods: list[Pods]) -> None:
    for pod in pods:
        if pod.command != "serve" or "nvidia.com/gpu" in pod.container["resources"]["limits"]:
            continue
        (shm,) = (volume["emptyDir"] for volume in pod.spec["volumes"] if volume["name"] == "shm")
        assert shm == {"medium": "Memory", "sizeLimit": "1Gi"}
        block = 16 * 45 << 10  # of the embedded model: docs/operations.md, Sizing
        assert (pod.settings.prefill_workers + pod.settings.decode_workers) * pod.settings.num_blocks * block < 1 << 30


def test_services_lead_to_ports_of_pods(documents: list[Document], pods: list[Pods]) -> None:
    services = of_kind(documents, "Service")
    assert services
    for service in services:
        for pod in selected({"matchLabels": service["spec"]["selector"]}, pods):
            assert [pod.ports[port["targetPort"]] for port in service["spec"]["ports"]] == [pod.ports["grpc"]]
            # A headless one's port is what the pods listen at, whatever it says.
            assert [port["port"] for port in service["spec"]["ports"]] == [pod.ports["grpc"]]


def test_what_else_selects_pods_selects_some(documents: list[Document], pods: list[Pods]) -> None:
    for deployment, pod in zip(of_kind(documents, "Deployment"), pods, strict=True):
        assert selected(deployment["spec"]["selector"], pods) == [pod]
        for constraint in pod.spec.get("topologySpreadConstraints", ()):
            assert selected(constraint["labelSelector"], pods) == [pod]
    for budget in of_kind(documents, "PodDisruptionBudget"):
        assert len(selected(budget["spec"]["selector"], pods)) == 1


def test_routers_name_services_that_lead_to_workers(documents: list[Document], pods: list[Pods]) -> None:
    services = {service["metadata"]["name"]: service["spec"] for service in of_kind(documents, "Service")}
    for pod in pods:
        if pod.command != "router":
            continue
        for addresses, command in (
            (pod.settings.prefill, "prefill-worker"),
            (pod.settings.decode, "decode-worker"),
        ):
            (address,) = addresses
            name, _, port = address.rpartition(":")
            assert services[name]["clusterIP"] == "None", "one address would stand for all workers"
            (worker,) = selected({"matchLabels": services[name]["selector"]}, pods)
            assert (worker.command, worker.ports["grpc"]) == (command, int(port))


def test_parts_of_a_cluster_have_the_same_settings(pods: list[Pods]) -> None:
    for name in ("model", "cluster_secret_file"):
        assert len({getattr(pod.settings, name) for pod in pods}) == 1
    workers = [pod for pod in pods if pod.command.endswith("-worker")]
    for name in ("transport", "dtype", "block_size"):
        assert len({getattr(pod.settings, name) for pod in workers}) <= 1


def let_in(documents: list[Document], pods: list[Pods], to: Pods, port: str) -> list[Pods | str]:
    """Who may reach a port of a pod: pods of the namespace, other namespaces by name, or everybody."""
    policies = [
        policy["spec"]
        for policy in of_kind(documents, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"], to.labels)
    ]
    if not policies:
        return ["everybody"]
    found: list[Pods | str] = []
    for rule in (rule for policy in policies for rule in policy["ingress"]):
        named = [each["port"] for each in rule.get("ports", ())]
        assert set(named) <= set(to.ports), "a port that the pod does not have"
        if named and port not in named:
            continue
        for peer in rule.get("from", [None]):
            match peer:
                case None:
                    found.append("everybody")
                case {"podSelector": selector}:
                    found += selected(selector, pods)
                case {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}:
                    found.append(name)
    return found


def test_only_routers_are_reached_from_outside(documents: list[Document], pods: list[Pods]) -> None:
    workers = [pod for pod in pods if pod.command.endswith("-worker")]
    for pod in pods:
        if pod in workers:
            routers = [router for router in pods if router.command == "router"]
            assert let_in(documents, pods, pod, "grpc") == [*routers, *workers]
            assert let_in(documents, pods, pod, "metrics") == [*workers, "monitoring"]
            assert let_in(documents, pods, pod, "any other") == workers, "UCX's"
        else:
            assert "everybody" in let_in(documents, pods, pod, "grpc")


def test_git_ignores_the_secret() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for folder in FOLDERS:
        for secret in yaml.safe_load((folder / "kustomization.yaml").read_text()).get("secretGenerator", ()):
            for name in secret["files"]:
                assert f"/{folder.relative_to(ROOT).as_posix()}/{name}" in ignored


@pytest.mark.skipif(KUBECTL is None, reason="there is no kubectl")
@pytest.mark.parametrize("name", ["one-host", "across-hosts"])
def test_the_kustomization_in_the_manual_changes_model_and_registry_of_all_parts(name: str, tmp_path: Path) -> None:
    sample = re.search(
        r"```yaml\n(# kustomization.yaml.*?)```", (ROOT / "docs/operations.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert sample is not None
    built(ROOT / "deploy/kubernetes" / name, tmp_path / "twostroke/deploy/kubernetes" / name)
    (tmp_path / "kustomization.yaml").write_text(sample[1].replace("one-host", name))
    deployments = of_kind(kustomize(tmp_path), "Deployment")
    assert deployments
    for deployment in deployments:
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert container["image"].startswith("registry.example/twostroke:")
        assert run_by_cli(container)[1].model == "meta-llama/Llama-3.1-8B-Instruct"
        assert deployment["metadata"]["namespace"] == "inference"
