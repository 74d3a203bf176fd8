import copy
import functools
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from prismaquant_ray import __version__, config
from prismaquant_ray.settings import values
from tests import k8s_schemas
from tests.k8s_schemas import LATER, SCHEMAS, objections, unknown_to, without

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
FOLDERS = ("base", "overlays/gpu", "overlays/cpu-kind", "overlays/interactive")
KINDS = {
    "base": "RayJob",
    "overlays/gpu": "RayJob",
    "overlays/cpu-kind": "RayJob",
    "overlays/interactive": "RayCluster",
}
KUBERNETES = "1.37"
DOCS = (ROOT / "docs" / "kuberay.md").read_text(encoding="utf-8")

Manifest = dict[str, Any]
CRDS: dict[str, Callable[[str], Manifest]] = {"published": k8s_schemas.published}
if "KUBERAY_CRD_DIR" in os.environ:
    CRDS["directory"] = functools.partial(k8s_schemas.from_directory, Path(os.environ["KUBERAY_CRD_DIR"]))


@functools.cache
def _rendered(folder: str) -> tuple[Manifest, ...]:
    kubectl = Path(sysconfig.get_path("scripts")) / "kubectl"
    text = subprocess.run([kubectl, "kustomize", K8S / folder], check=True, capture_output=True, text=True).stdout
    return tuple(yaml.safe_load_all(text))


def _ray(folder: str) -> Manifest:
    (found,) = [manifest for manifest in _rendered(folder) if manifest["apiVersion"] == "ray.io/v1"]
    return copy.deepcopy(found)


def _cluster(manifest: Manifest) -> Manifest:
    return manifest["spec"]["rayClusterSpec"] if manifest["kind"] == "RayJob" else manifest["spec"]


def _templates(manifest: Manifest) -> dict[str, Manifest]:
    cluster = _cluster(manifest)
    templates = {"head": cluster["headGroupSpec"]["template"]}
    templates |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    if manifest["kind"] == "RayJob":
        templates["submitter"] = manifest["spec"]["submitterPodTemplate"]
    return templates


def _pod(template: Manifest) -> Manifest:
    return {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "pod", **template["metadata"]}}


def _walk(node: Any) -> Iterator[Manifest]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _walk(child)


def _complaints(schema: Manifest, manifest: Manifest) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def _run(folder: str) -> Path:
    own = K8S / folder / "run.yaml"
    return own if own.exists() else K8S / "base" / "run.yaml"


# Rendering and schemas


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_renders_to_one_ray_object_its_run_and_a_network_policy(folder: str) -> None:
    assert sorted(manifest["kind"] for manifest in _rendered(folder)) == ["ConfigMap", "NetworkPolicy", KINDS[folder]]


@pytest.mark.parametrize("folder", FOLDERS)
def test_ray_objects_say_only_what_the_strict_schema_allows(folder: str) -> None:
    manifest = _ray(folder)
    assert _complaints(SCHEMAS[manifest["kind"]], manifest) == []


@pytest.mark.parametrize("crd", CRDS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_ray_objects_satisfy_the_crd_strictly_but_for_named_later_fields(folder: str, crd: str) -> None:
    manifest = _ray(folder)
    schema = CRDS[crd](manifest["kind"])
    later = LATER if crd == "published" else set()
    assert _complaints(schema, without(manifest, later)) == []


@pytest.mark.parametrize("crd", CRDS)
@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_strict_schema_knows_no_field_that_the_crd_does_not(kind: str, crd: str) -> None:
    cluster = ("spec", "rayClusterSpec") if kind == "RayJob" else ("spec",)
    job = {("spec", "backoffLimit"), ("spec", "submitterConfig")} if kind == "RayJob" else set()
    later = job | {(*cluster, "authOptions"), (*cluster, "autoscalerOptions", "version")}
    assert later <= LATER
    assert unknown_to(CRDS[crd](kind), SCHEMAS[kind]) == (later if crd == "published" else set())


@pytest.mark.parametrize("folder", FOLDERS)
def test_plain_objects_and_every_pod_satisfy_kubernetes_strictly(folder: str) -> None:
    plain = [manifest for manifest in _rendered(folder) if manifest["apiVersion"] != "ray.io/v1"]
    for manifest in [*plain, *map(_pod, _templates(_ray(folder)).values())]:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_operator_has_no_objection(folder: str) -> None:
    assert objections(_ray(folder)) == []


# Planted errors: that the checks above can fail


def _set(*path: str | int, value: Any) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        node: Any = manifest
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return change


def _drop(*path: str | int) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        node: Any = manifest
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]

    return change


CLUSTER = ("spec", "rayClusterSpec")
WORKERS = (*CLUSTER, "workerGroupSpecs", 0)
HEAD_POD = (*CLUSTER, "headGroupSpec", "template", "spec")

#: What the CRD and the strict schema must both refuse.
PLANTED = {
    "misspelt field of the job": _set("spec", "entryPoint", value="python"),
    "misspelt field of the cluster": _set(*CLUSTER, "enableAutoscaling", value=True),
    "misspelt field of the group": _set(*WORKERS, "maxReplica", value=4),
    "integer as string": _set("spec", "ttlSecondsAfterFinished", value="600"),
    "boolean as string": _set("spec", "shutdownAfterJobFinishes", value="true"),
    "string as integer": _set(*CLUSTER, "headGroupSpec", "rayStartParams", "num-cpus", value=0),
    "missing maxReplicas": _drop(*WORKERS, "maxReplicas"),
    "missing group name": _drop(*WORKERS, "groupName"),
    "missing head": _drop(*CLUSTER, "headGroupSpec"),
    "missing template": _drop(*WORKERS, "template"),
    "group outside a list": _set(*CLUSTER, "workerGroupSpecs", value={"groupName": "workers"}),
}
#: What only the strict schema refuses: fields later than the published CRD, and our own rules.
PLANTED_STRICT = {
    "unknown submission mode": _set("spec", "submissionMode", value="K8sJob"),
    "unknown autoscaler": _set(*CLUSTER, "autoscalerOptions", "version", value="v3"),
    "no authentication": _drop(*CLUSTER, "authOptions"),
    "authentication off": _set(*CLUSTER, "authOptions", "mode", value="disabled"),
    "retries as string": _set("spec", "backoffLimit", value="3"),
    "no deadline": _drop("spec", "activeDeadlineSeconds"),
    "no limits": _drop(*CLUSTER, "autoscalerOptions", "resources", "limits"),
    "alpha version": _set("apiVersion", value="ray.io/v1alpha1"),
}
#: What Kubernetes' schema of a Pod refuses, and the CRD's copy of it too.
PLANTED_PODS = {
    "misspelt field of a container": _set(*HEAD_POD, "containers", 0, "volumeMount", value=[]),
    "misspelt security setting": _set(*HEAD_POD, "securityContext", "runAsNonroot", value=True),
    "grace as string": _set(*HEAD_POD, "terminationGracePeriodSeconds", value="90"),
    "container without a name": _drop(*HEAD_POD, "containers", 0, "name"),
    "volume without a name": _drop(*HEAD_POD, "volumes", 0, "name"),
}
#: What only the operator refuses.
PLANTED_OPERATOR = {
    "ttl without shutdown": _set("spec", "shutdownAfterJobFinishes", value=False),
    "SidecarMode with a submitter": _set("spec", "submissionMode", value="SidecarMode"),
    "InteractiveMode with retries": _set("spec", "submissionMode", value="InteractiveMode"),
    "minimum above maximum": _set(*WORKERS, "minReplicas", value=9),
    "restarted head": _set(*HEAD_POD, "restartPolicy", value="Always"),
    "token for an old Ray": _set(*CLUSTER, "rayVersion", value="2.51.0"),
    "runtime environment that is text": _set("spec", "runtimeEnvYAML", value="env_vars"),
    "name too long": _set("metadata", "name", value="p" * 48),
}


@pytest.mark.parametrize("error", PLANTED | PLANTED_STRICT)
def test_the_strict_schema_refuses(error: str) -> None:
    manifest = _ray("overlays/gpu")
    (PLANTED | PLANTED_STRICT)[error](manifest)
    assert _complaints(SCHEMAS["RayJob"], manifest) != []


@pytest.mark.parametrize("crd", CRDS)
@pytest.mark.parametrize("error", PLANTED | PLANTED_PODS)
def test_the_crd_made_strict_refuses(error: str, crd: str) -> None:
    manifest = without(_ray("overlays/gpu"), LATER if crd == "published" else set())
    (PLANTED | PLANTED_PODS)[error](manifest)
    assert _complaints(CRDS[crd]("RayJob"), manifest) != []


@pytest.mark.parametrize("error", PLANTED_PODS)
def test_the_schema_of_pods_refuses(error: str) -> None:
    manifest = _ray("overlays/gpu")
    PLANTED_PODS[error](manifest)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(_pod(_templates(manifest)["head"]), KUBERNETES, strict=True)


@pytest.mark.parametrize("error", PLANTED_OPERATOR)
def test_the_operators_rules_refuse(error: str) -> None:
    manifest = _ray("overlays/gpu")
    PLANTED_OPERATOR[error](manifest)
    assert len(objections(manifest)) == 1


# References and secrets


def _references(pod: Manifest) -> Iterator[tuple[str, str]]:
    """(kind, name) of what a pod needs and does not bring."""
    for volume in pod.get("volumes", []):
        for key, kind, field in (
            ("configMap", "ConfigMap", "name"),
            ("secret", "Secret", "secretName"),
            ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
        ):
            if key in volume:
                yield kind, volume[key][field]
    for node in _walk(pod["containers"]):
        for key, kind in (
            ("configMapRef", "ConfigMap"),
            ("configMapKeyRef", "ConfigMap"),
            ("secretRef", "Secret"),
            ("secretKeyRef", "Secret"),
        ):
            if key in node:
                yield kind, node[key]["name"]
    if "serviceAccountName" in pod:
        yield "ServiceAccount", pod["serviceAccountName"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_pods_refer_to_is_rendered_or_documented_as_the_users(folder: str) -> None:
    rendered = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in _rendered(folder)}
    documented = {("Secret", name) for name in re.findall(r"kubectl create secret generic (\S+)", DOCS)}
    references = {reference for t in _templates(_ray(folder)).values() for reference in _references(t["spec"])}
    assert ("Secret", "prismaquant-object-store") in references
    assert references <= rendered | documented
    assert {kind for kind, _ in references} == {"ConfigMap", "Secret"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_run_is_mounted_where_the_entrypoint_reads_it(folder: str) -> None:
    pod = _templates(_ray(folder))["head"]["spec"]
    (name,) = [volume["name"] for volume in pod["volumes"] if "configMap" in volume]
    (mount,) = [m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if m["name"] == name]
    (data,) = [manifest["data"] for manifest in _rendered(folder) if manifest["kind"] == "ConfigMap"]
    assert list(data) == ["run.yaml"]
    assert data["run.yaml"] == _run(folder).read_text(encoding="utf-8")
    entrypoint = f"python -m jobs quantize {mount}/run.yaml"
    assert entrypoint in DOCS
    manifest = _ray(folder)
    if manifest["kind"] == "RayJob":
        assert manifest["spec"]["entrypoint"] == entrypoint


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_mount_has_its_volume(folder: str) -> None:
    for template in _templates(_ray(folder)).values():
        volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
        mounts = {m["name"] for c in template["spec"]["containers"] for m in c.get("volumeMounts", [])}
        assert mounts == volumes


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_secret_is_written_out(folder: str) -> None:
    secretive = re.compile(r"token|secret|password|key|credential", re.IGNORECASE)
    environments = [node["env"] for node in _walk(_ray(folder)) if "env" in node]
    literal = [e["name"] for env in environments for e in env if "value" in e and secretive.search(e["name"])]
    assert literal == []
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(K8S.rglob("*")) if path.is_file())
    assert not re.search(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|-----BEGIN|https?://[^/\s]+:[^/\s]+@", text)


# Security


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_pod_meets_the_restricted_standard(folder: str) -> None:
    for template in _templates(_ray(folder)).values():
        pod = template["spec"]
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["fsGroup"] == 1000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all({"configMap", "emptyDir"} & volume.keys() for volume in pod.get("volumes", []))
        for container in pod["containers"]:
            expected = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == expected
    assert _cluster(_ray(folder))["autoscalerOptions"]["securityContext"] == expected


@pytest.mark.parametrize("folder", FOLDERS)
def test_only_the_head_has_a_token_of_the_kubernetes_api(folder: str) -> None:
    for name, template in _templates(_ray(folder)).items():
        assert template["spec"].get("automountServiceAccountToken", True) is (name == "head")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_network_policy_selects_every_pod_and_lets_only_them_and_the_operator_in(folder: str) -> None:
    (policy,) = [manifest["spec"] for manifest in _rendered(folder) if manifest["kind"] == "NetworkPolicy"]
    label = policy["podSelector"]["matchLabels"]
    for template in _templates(_ray(folder)).values():
        assert label.items() <= template["metadata"]["labels"].items()
    ours, operator = policy["ingress"]
    assert ours == {"from": [{"podSelector": {"matchLabels": label}}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert "podSelector" in operator["from"][0]
    assert policy["policyTypes"] == ["Ingress", "Egress"]


# Resources, scaling, resuming


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_container_asks_for_and_is_limited_in_cores_and_memory(folder: str) -> None:
    for template in _templates(_ray(folder)).values():
        for container in template["spec"]["containers"]:
            for side in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][side].keys()


@pytest.mark.parametrize("folder", FOLDERS)
def test_probes_are_left_to_the_operator(folder: str) -> None:
    for node in _walk(_ray(folder)):
        assert not {"livenessProbe", "readinessProbe", "startupProbe"} & node.keys()


@pytest.mark.parametrize("folder", FOLDERS)
def test_ray_has_shared_memory_of_its_own_within_the_containers_limit(folder: str) -> None:
    templates = _templates(_ray(folder))
    templates.pop("submitter", None)
    for template in templates.values():
        pod = template["spec"]
        shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")["emptyDir"]
        assert shm["medium"] == "Memory"
        limit = pod["containers"][0]["resources"]["limits"]["memory"]
        assert values.parse_bytes(f"{shm['sizeLimit']}B") < values.parse_bytes(f"{limit}B") / 2
        assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_workers_come_on_demand_and_the_head_takes_no_work(folder: str) -> None:
    cluster = _cluster(_ray(folder))
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["minReplicas"] for group in cluster["workerGroupSpecs"]] == [0]


@pytest.mark.parametrize("folder", FOLDERS[1:])
def test_gpus_are_requested_and_tolerated_where_the_run_wants_them(folder: str) -> None:
    wants = yaml.safe_load(_run(folder).read_text(encoding="utf-8"))["cluster"]["device"] == "gpu"
    pod = _templates(_ray(folder))["workers"]["spec"]
    assert ("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]) is wants
    assert any(t["key"] == "nvidia.com/gpu" for t in pod.get("tolerations", [])) is wants
    images = {c["image"] for t in _templates(_ray(folder)).values() for c in t["spec"]["containers"]}
    assert len(images) == 1
    assert images.pop().endswith(f":0.5.0{'-cuda' if wants else ''}")


@pytest.mark.parametrize("folder", FOLDERS[:3])
def test_a_retried_job_is_the_same_job_on_a_new_cluster_that_goes_away(folder: str) -> None:
    spec = _ray(folder)["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["backoffLimit"] >= 1
    assert spec["submitterConfig"]["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > yaml.safe_load(_run(folder).read_text(encoding="utf-8"))["cluster"]["wait"]
    assert "jobId" not in spec  # a fixed one could not be submitted twice


@pytest.mark.parametrize("folder", FOLDERS[:3])
def test_the_driver_has_time_to_stop_before_its_pod_does(folder: str) -> None:
    manifest = _ray(folder)
    wait = int(yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    grace = _templates(manifest)["head"]["spec"]["terminationGracePeriodSeconds"]
    assert 3 < wait < grace


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_run_is_a_valid_configuration_that_survives_its_cluster(folder: str) -> None:
    run = config.load_config(_run(folder))
    cluster = _cluster(_ray(folder))
    assert str(run.store.run).startswith("s3://")
    assert str(run.store.output).startswith("s3://")
    assert run.model.source.startswith("s3://")
    assert run.cluster.address == "auto"
    assert run.cluster.wait > 0
    assert run.cluster.workers == cluster["workerGroupSpecs"][0]["maxReplicas"]


# The image, which is never built here


def _instructions() -> list[tuple[str, str]]:
    lines = [
        line
        for line in (K8S / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    logical = re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in logical)]


def _of(word: str) -> list[str]:
    return [rest for name, rest in _instructions() if name == word]


def _environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in _of("ENV") for pair in rest.split())


def test_the_image_copies_only_what_exists_and_is_sent_to_the_builder() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = {source for rest in _of("COPY") for source in rest.split()[:-1]}
    assert "*" in ignore
    assert copied == sent
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_the_image_holds_every_package_of_the_project() -> None:
    copied = {source for rest in _of("COPY") for source in rest.split()[:-1]}
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"} <= copied
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= copied


def test_the_image_uses_no_variable_before_it_is_declared() -> None:
    declared: set[str] = set()
    for word, rest in _instructions():
        used = set(re.findall(r"\$\{([A-Z_]+)", rest)) - {"PATH"}
        assert used <= declared, f"{word} {rest}"
        if word == "FROM":
            declared.clear()  # an ARG before FROM is not seen after it
        elif word == "ARG":
            declared.add(rest.split("=")[0])
        elif word == "ENV":
            declared |= {pair.split("=")[0] for pair in rest.split()}
    assert not re.search(r"TOKEN|SECRET|PASSWORD", " ".join([*_of("ARG"), *_of("ENV")]))


def test_the_image_runs_commands_that_a_shell_can_read() -> None:
    for command in _of("RUN"):
        subprocess.run([shutil.which("sh") or "/bin/sh", "-n", "-c", command], check=True)


def test_the_image_has_what_kuberay_calls_and_only_pinned_python_packages() -> None:
    installed = next(command for command in _of("RUN") if "apt-get install" in command).split()
    assert {"bash", "grep", "wget"} <= set(installed)
    pips = [command for command in _of("RUN") if "pip install" in command]
    assert len(pips) == 2
    assert all("--constraint constraints.txt" in command for command in pips)
    assert _environment()["PATH"].startswith("/opt/venv/bin:")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_image_ends_as_the_user_and_with_the_paths_that_the_manifests_expect(folder: str) -> None:
    last, user = _instructions()[-1]
    template = _templates(_ray(folder))["head"]["spec"]
    security = template["securityContext"]
    assert (last, user) == ("USER", f"{security['runAsUser']}:{security['runAsGroup']}")
    home = _environment()["HF_HOME"]
    assert {"name": "HF_HOME", "value": home} in template["containers"][0]["env"]
    assert any(mount["mountPath"] == home for mount in template["containers"][0]["volumeMounts"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_calibration_text_of_the_run_is_in_the_image(folder: str) -> None:
    text = yaml.safe_load(_run(folder).read_text(encoding="utf-8"))["calibration"]["text"]
    working, copied = PurePosixPath("/"), {}
    for word, rest in _instructions():
        if word == "WORKDIR":
            working /= rest
        elif word == "COPY":
            *sources, target = rest.split()
            copied |= {str(working / target): sources}
    assert copied[text] == ["configs/data/calibration.txt"]


def test_ray_and_the_image_are_the_pinned_and_current_versions() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    for folder in FOLDERS:
        assert _cluster(_ray(folder))["rayVersion"] == pins["ray"]
    assert __version__ == "0.5.0", "the images named in the overlays"
