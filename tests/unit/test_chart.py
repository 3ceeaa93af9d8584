"""The Helm chart, by the real Helm as a library: it lints, renders and validates with every values file, and nothing in it is without effect."""

import copy
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python import HelmError
from helm_python.chart import Chart, lint
from lightkube.resources.batch_v1 import Job

from services.control_plane.job_plan import ONLY_RUN, JobTemplate
from services.runtime.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "offbeat"
KUBERNETES = "1.37"
OLDEST_KUBERNETES = "1.29"
NOT_OF_KUBERNETES = {"PodMonitor", "PrometheusRule", "RayCluster", "ScaledObject"}
"""Kinds of operators: there is no schema for them."""
READ_BY_RAY = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED"}
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
SECRET = {"existingSecret": "offbeat"}
WITH_JOBS = {"multi-node"}
"""Cases in which the control plane makes a Job for each run."""
FILES = {path.stem: yaml.safe_load(path.read_text()) | SECRET for path in sorted((CHART / "values").glob("*.yaml"))}
CASES = {"defaults": SECRET, "external-redis": SECRET | {"redis": {"builtIn": False, "url": "rediss://redis.example.com:6380/0"}}, **FILES}

Values = dict[str, Any]
Document = dict[str, Any]


@functools.cache
def chart() -> Chart:
    return Chart.load(CHART)


def rendered(values: Values) -> dict[str, str]:
    return chart().render(values, name="demo", namespace="rl")


def documents(values: Values) -> list[Document]:
    texts = [text for path, text in sorted(rendered(values).items()) if path.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


@functools.cache
def of_case(name: str) -> list[Document]:
    return documents(CASES[name])


def pods(of: list[Document]) -> dict[str, Document]:
    """Pod, with metadata and spec, by component. Of a trainer on Ray, `trainer` is the head."""
    found = [d for d in of if d["kind"] == "Pod"] + [d["spec"]["template"] for d in of if d["kind"] in {"Deployment", "StatefulSet"}]
    found += [job["spec"]["template"] for job in job_templates(of)]
    clusters = [d["spec"] for d in of if d["kind"] == "RayCluster"]
    found += [cluster["headGroupSpec"]["template"] for cluster in clusters]
    workers = [("ray-worker", group["template"]) for cluster in clusters for group in cluster["workerGroupSpecs"]]
    return {pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod for pod in found} | dict(workers)


def job_templates(of: list[Document]) -> list[Document]:
    """What the control plane makes Jobs of."""
    return [yaml.safe_load(d["data"]["trainer-job.yaml"]) for d in of if d["kind"] == "ConfigMap" and "trainer-job.yaml" in d["data"]]


def named(of: list[Document], kind: str, component: str) -> Document:
    (found,) = [d for d in of if d["kind"] == kind and d["metadata"]["labels"]["app.kubernetes.io/component"] == component]
    return found


def environment(pod: Document, container: int = 0) -> dict[str, Any]:
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in pod["spec"]["containers"][container]["env"]}


@functools.cache
def complaint(document: str, version: str) -> str | None:
    try:
        kubernetes_validate.validate(json.loads(document), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return None


def complaints(of: list[Document], version: str = KUBERNETES) -> list[str]:
    """What a Kubernetes API server of that version would refuse, misspelt fields among it."""
    return [what for d in of if d["kind"] not in NOT_OF_KUBERNETES and (what := complaint(json.dumps(d), version)) is not None]


@pytest.mark.parametrize("case", CASES)
def test_every_values_file_lints_renders_and_validates(case: str) -> None:
    report = lint(CHART, CASES[case], strict=True, kube_version=KUBERNETES)
    assert [message for message in report["messages"] if message["severity"] > 1] + report["errors"] == []
    assert len(of_case(case)) > 15
    assert complaints(of_case(case)) == []


def test_the_oldest_kubernetes_that_the_chart_asks_for_would_do() -> None:
    assert chart().metadata["kubeVersion"] == f">={OLDEST_KUBERNETES}.0-0"
    assert complaints(of_case("multi-node"), OLDEST_KUBERNETES) == []


def test_there_are_values_for_each_kind_of_cluster() -> None:
    assert set(FILES) == {"cpu", "gpu-1", "gpu-8", "multi-node", "ray"}


def test_a_misspelt_field_is_caught(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "offbeat")
    template = tmp_path / "offbeat" / "templates" / "trainer.yaml"
    template.write_text(template.read_text().replace("podManagementPolicy", "podManagmentPolicy"))
    with Chart.load(tmp_path / "offbeat") as misspelt:
        text = misspelt.render(SECRET, name="demo")["offbeat/templates/trainer.yaml"]
    (found,) = complaints([document for document in yaml.safe_load_all(text) if document])
    assert "podManagmentPolicy" in found


def test_without_its_secret_the_chart_is_not_rendered() -> None:
    with pytest.raises(HelmError, match="existingSecret is not set: name a Secret with the keys token, cluster-token and redis-password"):
        rendered({})


@pytest.mark.parametrize(
    ("values", "named_in_error"),
    [
        ({"rolloutServer": {"gpu": 1}}, "gpu"),
        ({"rollout": {}}, "rollout"),
        ({"trainer": {"replicas": "two"}}, "replicas"),
        ({"trainer": {"gpus": 2}}, "gpus"),
        ({"trainer": {"kind": "jobs", "gpus": 2}}, "gpus"),
        ({"trainer": {"kind": "ray", "ray": {"worker": 2}}}, "worker"),
        ({"trainer": {"kind": "ray", "ray": {"workers": 0}}}, "workers"),
        ({"image": {"variant": "rocm"}}, "variant"),
        ({"rolloutServer": {"autoscaling": {"kind": "vpa"}}}, "kind"),
        ({"rolloutServer": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}, "invalid propertyName"),
        ({"storage": {"runs": {"size": "much"}}}, "size"),
        ({"ingress": {"enabled": True}}, "host"),
        ({"ingress": {"enabled": True, "host": "offbeat.example.com"}}, "tlsSecret"),
        ({"redis": {"builtIn": False}}, "url"),
        ({"redis": {"builtIn": False, "url": "redis://:password@redis.example.com:6379/0"}}, "url"),
        ({"redis": {"url": "redis://redis.example.com:6379/0"}}, "url"),
    ],
    ids=json.dumps,
)
def test_values_out_of_the_schema_are_refused(values: Values, named_in_error: str) -> None:
    with pytest.raises(HelmError, match=named_in_error):
        rendered(SECRET | values)


def leaves(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all values; an empty section is a value itself."""
    if isinstance(values, dict) and values:
        for key, below in values.items():
            yield from leaves(below, (*path, key))
    else:
        yield path


def at(tree: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda below, key: below[key], path, tree)


def schema_of(path: tuple[str, ...]) -> dict[str, Any]:
    node: dict[str, Any] = SCHEMA
    for key in path:
        while "$ref" in node:
            node = SCHEMA["$defs"][node["$ref"].rpartition("/")[2]]
        node = node["properties"][key] if key in node.get("properties", {}) else node["additionalProperties"]
    while "$ref" in node:
        node = SCHEMA["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def others(path: tuple[str, ...], value: Any) -> list[Any]:
    """Values other than this one that the schema allows."""
    schema = schema_of(path)
    if "enum" in schema:
        return [other for other in schema["enum"] if other != value]
    if path[-1] == "tolerations":
        return [[{"key": "other", "operator": "Exists"}]]
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value - 1]
        case list():
            return [["other"]]
        case dict():
            return [{"other": "value"}]
    candidates = ["other", "7", "7s", "redis://other:6379/0", "http://other", "10.0.0.0/8"]
    return [other for other in candidates if re.fullmatch(schema.get("pattern", ".*"), other)] or ["7"]


def changed(values: Values, path: tuple[str, ...], value: Any) -> Values:
    fresh: Values = copy.deepcopy(values)
    functools.reduce(lambda below, key: below.setdefault(key, {}), path[:-1], fresh)[path[-1]] = value
    return fresh


@functools.cache
def whole_case(name: str) -> Values:
    return chart().merge_values(CASES[name])


@functools.cache
def text_of_case(name: str) -> str:
    return json.dumps(rendered(CASES[name]), sort_keys=True)


ALL_ON = "multi-node"
ORDER = [ALL_ON, *(name for name in CASES if name != ALL_ON)]


CHANGED_TOGETHER = {("redis", "builtIn")}
"""With redis.url; the case external-redis does."""


@pytest.mark.parametrize("path", [path for path in leaves(DEFAULTS) if path not in CHANGED_TOGETHER], ids=".".join)
def test_every_value_has_a_reader(path: tuple[str, ...]) -> None:
    for case in ORDER:
        values = whole_case(case)
        for other in others(path, at(values, path)):
            try:
                text = json.dumps(rendered(changed(CASES[case], path, other)), sort_keys=True)
            except HelmError:  # not allowed beside the others of this case
                continue
            if text != text_of_case(case):
                return
    pytest.fail(f"{'.'.join(path)} changes nothing that is rendered")


def test_a_value_without_a_reader_would_be_found() -> None:
    unread = changed(CASES["cpu"], ("rolloutServer", "autoscaling", "maxReplicas"), 99)
    assert json.dumps(rendered(unread), sort_keys=True) == text_of_case("cpu"), "without autoscaling nothing reads it"


def test_the_schema_knows_every_value_and_no_other() -> None:
    def check(node: dict[str, Any], path: str) -> None:
        while "$ref" in node:
            node = SCHEMA["$defs"][node["$ref"].rpartition("/")[2]]
        if node.get("type") == "object" and "properties" in node:
            assert node["additionalProperties"] is False, path
            for key, below in node["properties"].items():
                check(below, f"{path}.{key}")

    check(SCHEMA, "")
    for path in leaves(DEFAULTS):
        assert schema_of(path), path
    assert set(SCHEMA["properties"]) == {*DEFAULTS, "global"}
    assert set(SCHEMA["required"]) == set(DEFAULTS)


@pytest.mark.parametrize("case", CASES)
def test_every_pod_is_restricted_and_knows_no_more_secrets_than_it_needs(case: str) -> None:
    keys = {
        "redis": {"redis-password"},
        "control-plane": {"token", "cluster-token", "redis-password"},
        "reward-server": {"cluster-token", "redis-password"},
        "rollout-server": {"cluster-token", "redis-password"},
        "trainer": {"cluster-token", "redis-password"},
        "ray-worker": {"cluster-token", "redis-password"},
        "test": {"token"},
    }
    found = pods(of_case(case))
    assert set(found) == set(keys) - ({"redis"} if case == "external-redis" else set()) - (set() if case == "ray" else {"ray-worker"})
    for component, pod in found.items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is (component == "control-plane" and case in WITH_JOBS)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
        assert not any("hostPath" in volume for volume in spec["volumes"])
        secrets = [volume["secret"] for volume in spec["volumes"] if "secret" in volume]
        assert [{item["key"] for item in secret["items"]} for secret in secrets] == [keys[component]]
        assert {secret["secretName"] for secret in secrets} == {"offbeat"}


def test_no_object_is_there_twice_and_all_names_are_short_enough() -> None:
    for case in CASES:
        names = [(d["kind"], d["metadata"]["name"]) for d in of_case(case)]
        assert len(names) == len(set(names))
        assert max(len(name) for _, name in names) <= 52, "pods of a StatefulSet, and labels, have something added"
        assert {d["metadata"]["namespace"] for d in of_case(case)} == {"rl"}


def test_only_a_control_plane_that_makes_jobs_has_rights_in_the_cluster_and_no_more_than_it_uses() -> None:
    for case in CASES:
        of = of_case(case)
        kinds = {d["kind"] for d in of}
        assert not kinds & {"ClusterRole", "ClusterRoleBinding", "Secret"}
        rights = {"ServiceAccount", "Role", "RoleBinding"}
        assert kinds & rights == (rights if case in WITH_JOBS else set())
        accounts = {component: pod["spec"].get("serviceAccountName") for component, pod in pods(of).items()}
        assert {c: name for c, name in accounts.items() if name} == ({"control-plane": "demo-offbeat-control-plane"} if case in WITH_JOBS else {})
    of = of_case("multi-node")
    account, role, binding = (named(of, kind, "control-plane") for kind in ("ServiceAccount", "Role", "RoleBinding"))
    assert role["rules"] == [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "list", "delete"]}]
    assert account["automountServiceAccountToken"] is False
    name = "demo-offbeat-control-plane"
    assert {d["metadata"]["name"] for d in (account, role, binding)} == {name}
    assert binding["roleRef"] == {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": name, "namespace": "rl"}]


def test_only_a_control_plane_that_makes_jobs_reaches_the_kubernetes_api() -> None:
    def blocks(case: str, component: str, values: Values | None = None) -> list[Document]:
        of = of_case(case) if values is None else documents(CASES[case] | values)
        policy = named(of, "NetworkPolicy", component)["spec"]
        return [rule for rule in policy["egress"] if any("ipBlock" in peer for peer in rule.get("to", []))]

    ports = [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}]
    for case in CASES:
        for component in pods(of_case(case)).keys() - {"ray-worker"}:
            allowed = [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": ports}] if (case, component) == ("multi-node", "control-plane") else []
            assert blocks(case, component) == allowed
    (narrowed,) = blocks("multi-node", "control-plane", {"networkPolicy": {"apiServer": {"cidr": "10.0.0.1/32", "port": 443}}})
    assert narrowed["to"] == [{"ipBlock": {"cidr": "10.0.0.1/32"}}]
    assert {port["port"] for port in narrowed["ports"]} == {443}


@pytest.mark.parametrize("case", CASES)
def test_weights_go_by_nccl_where_trainer_and_servers_have_a_card_each(case: str) -> None:
    expected = "gloo" if case in {"cpu", "gpu-1"} else "nccl"
    trainers = [environment(pod) for component, pod in pods(of_case(case)).items() if component in {"trainer", "ray-worker"}]
    assert {told["OFFBEAT_WEIGHT_TRANSPORT"] for told in trainers} == {expected}


@pytest.mark.parametrize("case", CASES)
def test_what_pods_are_told_is_what_processes_read(case: str) -> None:
    read = {f"OFFBEAT_{name.upper()}" for name in Settings.model_fields} | {"OFFBEAT_URL", "OMP_NUM_THREADS", *READ_BY_RAY}
    everyone = [(component, pod, n) for component, pod in pods(of_case(case)).items() for n, _ in enumerate(pod["spec"]["containers"])]
    for component, pod, container in everyone:
        if component not in {"redis", "test"}:
            told = environment(pod, container)
            assert set(told) <= read
            assert len(told) == len(pod["spec"]["containers"][container]["env"]), "nothing twice"
            assert ONLY_RUN not in told, "the control plane tells it"
            assert told["OFFBEAT_ADVERTISE"] == {"fieldRef": {"fieldPath": "status.podIP"}}
            mounted = {mount["mountPath"] for mount in pod["spec"]["containers"][container]["volumeMounts"]}
            files = [Path(value) for name, value in told.items() if name.endswith(("_FILE", "_PATH", "_TEMPLATE"))]
            assert {str(path.parent) for path in files} <= mounted
            assert ("/data" in mounted) == (component in {"control-plane", "trainer", "ray-worker"})


@pytest.mark.parametrize("case", CASES)
def test_what_selects_pods_selects_some(case: str) -> None:
    labels = {component: pod["metadata"]["labels"] for component, pod in pods(of_case(case)).items()}

    def selected(selector: dict[str, str]) -> set[str]:
        return {component for component, own in labels.items() if selector.items() <= own.items()}

    policies, budgets, services = set(), set(), set()
    for d in of_case(case):
        spec, component = d.get("spec", {}), d["metadata"]["labels"]["app.kubernetes.io/component"]
        match d["kind"]:
            case "Deployment" | "StatefulSet":
                assert selected(spec["selector"]["matchLabels"]) == {component}
                for constraint in spec["template"]["spec"]["topologySpreadConstraints"]:
                    assert selected(constraint["labelSelector"]["matchLabels"]) == {component}
            case "NetworkPolicy":
                policies |= selected(spec["podSelector"]["matchLabels"])
            case "PodDisruptionBudget":
                budgets |= selected(spec["selector"]["matchLabels"])
            case "Service":
                assert selected(spec["selector"]) == {component}
                services.add(component)
            case "PodMonitor":
                containers = [pods(of_case(case))[c]["spec"]["containers"][0] for c in selected(spec["selector"]["matchLabels"]) - {"redis", "test"}]
                for endpoint in spec["podMetricsEndpoints"]:
                    scraped = [c["name"] for c in containers if endpoint["port"] in {port["name"] for port in c["ports"]}]
                    assert set(scraped) == {"control-plane", "reward-server", "rollout-server", "ray-worker" if case == "ray" else "trainer"}
    assert policies == set(labels)
    by_operators = {"trainer", "ray-worker"} if case in {"multi-node", "ray"} else set()
    assert budgets == set(labels) - {"test"} - by_operators
    assert services == set(labels) & {"redis", "control-plane", "trainer"} - by_operators


def test_claims_that_are_mounted_are_made_unless_they_are_there_already() -> None:
    for values in (SECRET, SECRET | {"storage": {"runs": {"existingClaim": "nfs"}}}):
        of = documents(values)
        made = {d["metadata"]["name"] for d in of if d["kind"] == "PersistentVolumeClaim"}
        claims = [v["persistentVolumeClaim"] for pod in pods(of).values() for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v]
        mounted = {claim["claimName"] for claim in claims}
        assert mounted - made == ({"nfs"} if "storage" in values else set())
        assert made <= mounted


def test_reward_servers_reach_redis_and_names_and_nothing_else() -> None:
    policy = named(of_case("defaults"), "NetworkPolicy", "reward-server")["spec"]
    names, redis = policy["egress"]
    assert [port["port"] for port in names["ports"]] == [53, 53]
    assert names["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}]
    assert [port["port"] for port in redis["ports"]] == [6379]
    (peer,) = redis["to"]
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "redis"
    elsewhere = named(of_case("external-redis"), "NetworkPolicy", "reward-server")["spec"]["egress"][1]
    assert elsewhere == {"ports": [{"protocol": "TCP", "port": 6380}]}


def test_only_the_api_can_be_reached_from_outside() -> None:
    for component in pods(of_case("defaults")):
        policy = named(of_case("defaults"), "NetworkPolicy", component)["spec"]
        namespaces = {
            peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
            for rule in policy["ingress"]
            for peer in rule["from"]
            if "namespaceSelector" in peer
        }
        outside = {"ingress-nginx"} if component == "control-plane" else set()
        assert namespaces == ({"monitoring"} | outside if component not in {"redis", "test"} else set())


def test_gpus_are_asked_for_where_there_are_any() -> None:
    def asked(case: str, component: str) -> dict[str, Any]:
        limits = pods(of_case(case))[component]["spec"]["containers"][0]["resources"]["limits"]
        return {key: value for key, value in limits.items() if key not in {"cpu", "memory"}}

    for component in ("rollout-server", "trainer"):
        assert asked("defaults", component) == {"nvidia.com/gpu": 1}
        assert asked("cpu", component) == {}
        assert asked("gpu-1", component) == {"nvidia.com/gpu.shared": 1}
        assert pods(of_case("multi-node"))[component]["spec"]["runtimeClassName"] == "nvidia"
    for component in ("control-plane", "reward-server"):
        assert asked("defaults", component) == {}
    assert pods(of_case("multi-node"))["reward-server"]["spec"]["runtimeClassName"] == "gvisor"


def test_images_come_in_the_variant_that_is_asked_for() -> None:
    images = {component: pod["spec"]["containers"][0]["image"] for component, pod in pods(of_case("cpu")).items()}
    assert images["trainer"] == "offbeat/trainer:0.1.0-cpu"
    assert images["reward-server"] == "offbeat/reward-server:0.1.0"
    assert pods(of_case("multi-node"))["trainer"]["spec"]["containers"][0]["image"] == "registry.example.com/offbeat/trainer:0.1.0-cuda"


def test_autoscaling_leaves_the_number_of_replicas_to_the_autoscaler() -> None:
    of = of_case("multi-node")
    scaler, scaled = named(of, "HorizontalPodAutoscaler", "reward-server")["spec"], named(of, "ScaledObject", "rollout-server")["spec"]
    assert scaler["scaleTargetRef"]["name"] == named(of, "Deployment", "reward-server")["metadata"]["name"]
    assert scaled["scaleTargetRef"]["name"] == named(of, "Deployment", "rollout-server")["metadata"]["name"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (4, 24)
    assert 'offbeat_queue_groups{namespace="rl", place="queued"}' in scaled["triggers"][0]["metadata"]["query"]
    assert scaler["metrics"][0]["external"]["metric"]["selector"]["matchLabels"] == {"place": "generated"}
    for component in ("reward-server", "rollout-server"):
        assert "replicas" not in named(of, "Deployment", component)["spec"]
        assert named(of_case("defaults"), "Deployment", component)["spec"]["replicas"] > 0


def template_of(folder: Path, values: Values) -> JobTemplate:
    """As a control plane reads what is mounted for it."""
    (text,) = [d["data"]["trainer-job.yaml"] for d in documents(values) if d["kind"] == "ConfigMap" and "trainer-job.yaml" in d["data"]]
    (folder / "trainer-job.yaml").write_text(text)
    return JobTemplate.read(folder / "trainer-job.yaml")


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, KUBERNETES])
def test_what_the_control_plane_makes_of_the_template_is_a_job_of_one_run(tmp_path: Path, version: str) -> None:
    template = template_of(tmp_path, CASES["multi-node"])
    assert (template.name, template.namespace) == ("demo-offbeat-trainer", "rl")
    run_id = "study-20261122-104501-3f9a.an_arm.0"
    job = template.of_run(run_id, "demo-offbeat-trainer-0")
    assert complaints([job], version) == []
    assert Job.from_dict(job).to_dict() == job, "nothing is lost on the way to the API server"
    assert environment(job["spec"]["template"]) == environment(template.manifest["spec"]["template"]) | {ONLY_RUN: run_id}
    for metadata in (job["metadata"], job["spec"]["template"]["metadata"]):
        assert metadata["labels"]["offbeat/run"] == metadata["annotations"]["offbeat/run"] == run_id
        assert metadata["labels"]["app.kubernetes.io/component"] == "trainer"
    misspelt = json.loads(json.dumps(job).replace("backoffLimit", "backofLimit"))
    assert "backofLimit" in complaints([misspelt], version)[0]


def test_jobs_are_trainers_like_the_others_and_as_many_as_are_asked_for() -> None:
    as_job, as_replica = (pods(of_case(case))["trainer"] for case in ("multi-node", "gpu-8"))
    assert environment(as_job).keys() == environment(as_replica).keys()
    assert as_job["spec"]["restartPolicy"] == "Never"
    assert environment(pods(of_case("multi-node"))["control-plane"])["OFFBEAT_TRAINER_JOBS"] == "4"
    assert "StatefulSet" not in {d["kind"] for d in of_case("multi-node") if d["metadata"]["name"].endswith("trainer")}
    assert not any(job_templates(of_case(case)) for case in CASES if case not in WITH_JOBS)


def test_another_template_starts_the_control_plane_again() -> None:
    def checksum(values: Values) -> str:
        return str(pods(documents(CASES["multi-node"] | values))["control-plane"]["metadata"]["annotations"]["checksum/trainer-job"])

    trainer = CASES["multi-node"]["trainer"]
    assert checksum({}) == checksum({"rewardServer": {"replicas": 3}})
    assert checksum({}) != checksum({"trainer": trainer | {"threads": 3}})


def ray_cluster(values: Values) -> Document:
    (found,) = [d for d in documents(values) if d["kind"] == "RayCluster"]
    return found


def as_kubernetes_sees_them(cluster: Document) -> list[Document]:
    """The templates in a RayCluster, each as a Deployment: what an API server would say of its pods."""
    templates = [group["template"] for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"])]
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "ray"},
            "spec": {"selector": {"matchLabels": template["metadata"]["labels"]}, "template": template},
        }
        for template in templates
    ]


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, KUBERNETES])
def test_the_pods_of_a_trainer_on_ray_are_pods(version: str) -> None:
    cluster = ray_cluster(CASES["ray"])
    assert (cluster["apiVersion"], cluster["metadata"]["name"]) == ("ray.io/v1", "demo-offbeat-trainer-0")
    assert complaints(as_kubernetes_sees_them(cluster), version) == []


@pytest.mark.parametrize("misspelling", [("preStop", "preStopp"), ("tcpSocket", "tcpSockets"), ("imagePullPolicy", "imagePullPolice")])
def test_a_misspelt_field_in_a_pod_of_ray_is_caught(misspelling: tuple[str, str]) -> None:
    misspelt = json.loads(json.dumps(ray_cluster(CASES["ray"])).replace(*misspelling))
    found = complaints(as_kubernetes_sees_them(misspelt))
    assert len(found) == 2
    assert all(misspelling[1] in what for what in found)


FIELDS_OF_RAY = {
    "": {"rayVersion", "upgradeStrategy", "headGroupSpec", "workerGroupSpecs"},
    "headGroupSpec": {"rayStartParams", "template"},
    "workerGroupSpecs": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}
"""Of KubeRay 1.6's ray.io/v1, those that are used."""
OPTIONS_OF_RAY = {"node-manager-port", "object-store-memory", "disable-usage-stats", "num-cpus", "num-gpus"}
"""Of `ray start`, which refuses others."""


def test_a_ray_cluster_has_the_fields_that_kuberay_knows() -> None:
    spec = ray_cluster(CASES["ray"])["spec"]
    assert set(spec) == FIELDS_OF_RAY[""]
    head, (workers,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert set(head) == FIELDS_OF_RAY["headGroupSpec"]
    assert set(workers) == FIELDS_OF_RAY["workerGroupSpecs"]
    assert set(workers["rayStartParams"]) == OPTIONS_OF_RAY
    assert set(head["rayStartParams"]) == OPTIONS_OF_RAY | {"include-dashboard"}
    assert all(isinstance(value, str) for group in (head, workers) for value in group["rayStartParams"].values()), "KubeRay refuses numbers"
    assert spec["upgradeStrategy"] == {"type": "Recreate"}, "else an upgrade changes no pod"
    assert f"ray=={spec['rayVersion']}" in (ROOT / "deploy" / "locks" / "ray.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("trainer", "on_each", "asked", "ranks"),
    [({}, "8", {"nvidia.com/gpu": 8}, "16"), ({"gpus": 2, "ray": {"workers": 3}}, "2", {"nvidia.com/gpu": 2}, "6"), ({"gpus": 0}, "1", {}, "2")],
)
def test_a_trainer_on_ray_has_a_rank_for_each_gpu(trainer: Values, on_each: str, asked: dict[str, int], ranks: str) -> None:
    spec = ray_cluster(CASES["ray"] | {"trainer": CASES["ray"]["trainer"] | trainer})["spec"]
    (workers,) = spec["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == trainer.get("ray", {"workers": 2})["workers"]
    assert workers["rayStartParams"]["num-cpus"] == on_each
    assert workers["rayStartParams"]["num-gpus"] == str(trainer.get("gpus", 8))
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert {key: value for key, value in limits.items() if key != "memory"} == asked
    assert ("runtimeClassName" in workers["template"]["spec"]) == bool(asked)
    ray_head, launcher = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0", "no rank on the head"
    told = environment(spec["headGroupSpec"]["template"], 1)
    assert (told["OFFBEAT_TRAINER_RANKS"], told["OFFBEAT_RANK_GPUS"]) == (ranks, str(min(1, len(asked)))), "it starts before the workers are there"
    assert ray_head["volumeMounts"] == launcher["volumeMounts"], "a driver reaches its node by files in /tmp and /dev/shm"
    assert spec["headGroupSpec"]["template"]["spec"]["shareProcessNamespace"] is True, "and Ray must see its process"


def test_launchers_have_names_that_stay_and_find_their_own_head() -> None:
    trainers = documents(CASES["ray"] | {"trainer": CASES["ray"]["trainer"] | {"replicas": 2}})
    names = [d["metadata"]["name"] for d in trainers if d["kind"] == "RayCluster"]
    told = [environment(d["spec"]["headGroupSpec"]["template"], 1) for d in trainers if d["kind"] == "RayCluster"]
    assert names == ["demo-offbeat-trainer-0", "demo-offbeat-trainer-1"] == [each["OFFBEAT_MEMBER"] for each in told]
    for each in told:
        assert each["OFFBEAT_RAY_ADDRESS"] == "$(OFFBEAT_ADVERTISE):6379"
        assert list(each).index("OFFBEAT_ADVERTISE") < list(each).index("OFFBEAT_RAY_ADDRESS"), "Kubernetes puts in what comes before"


def test_names_of_ray_clusters_are_as_short_as_kuberay_wants_them() -> None:
    rendering = chart().render(CASES["ray"] | {"trainer": CASES["ray"]["trainer"] | {"replicas": 100}}, name="r" * 53, namespace="rl")
    names = [d["metadata"]["name"] for d in yaml.safe_load_all(rendering["offbeat/templates/ray.yaml"]) if d]
    assert len(names) == 100
    assert max(len(name) for name in names) <= 53


def test_ray_ends_after_what_runs_on_it(tmp_path: Path) -> None:
    (workers,) = ray_cluster(CASES["ray"])["spec"]["workerGroupSpecs"]
    shell = workers["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    for at_work, waits in ((["python", "-m", "trainer"], True), (["python", "-m", "rollout_server"], False)):
        folder = tmp_path / at_work[-1] / "7"
        folder.mkdir(parents=True)
        (folder / "cmdline").write_bytes("\0".join([*at_work, ""]).encode())
        own = folder.with_name("8")
        own.mkdir()
        (own / "cmdline").write_bytes("\0".join([*shell, ""]).encode())
        command = [*shell[:-1], shell[-1].replace("/proc", str(folder.parent)).replace("sleep 1", "exit 9")]
        assert subprocess.run(command, check=False).returncode == (9 if waits else 0)
    ray_head, launcher = ray_cluster(CASES["ray"])["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    lock = ray_head["lifecycle"]["preStop"]["exec"]["command"][1]
    assert launcher["command"][:3] == ["flock", "--no-fork", lock]
    assert launcher["command"][3:] == ["python", "-m", "trainer.launch"]


def test_ray_takes_nobody_without_the_token_of_the_fleet() -> None:
    for component in ("trainer", "ray-worker"):
        pod = pods(of_case("ray"))[component]
        for container, _ in enumerate(pod["spec"]["containers"]):
            told = environment(pod, container)
            assert (told["RAY_AUTH_MODE"], told["RAY_AUTH_TOKEN_PATH"]) == ("token", told["OFFBEAT_CLUSTER_TOKEN_FILE"])


def test_the_pods_of_trainers_reach_each_other_where_they_are_several() -> None:
    for case in ("ray", "defaults"):
        policy = named(of_case(case), "NetworkPolicy", "trainer")["spec"]
        own = {"podSelector": policy["podSelector"]}
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            rules = [rule for rule in policy[direction] if own in rule.get(peers, [])]
            assert rules == ([{peers: [own]}] if case == "ray" else []), "on all ports, or not at all"


def test_no_trainer_of_another_kind_is_beside_one_on_ray() -> None:
    kinds = {d["kind"] for d in of_case("ray")}
    assert "RayCluster" in kinds
    assert job_templates(of_case("ray")) == []
    assert not [d for d in of_case("ray") if d["kind"] == "StatefulSet" and d["metadata"]["name"].endswith("trainer")]
    assert not [case for case in CASES if case != "ray" and "RayCluster" in {d["kind"] for d in of_case(case)}]


def test_rules_and_dashboards_are_those_of_the_repository() -> None:
    of = of_case("multi-node")
    rules = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yaml"))
    assert rules
    assert [d["spec"] for d in of if d["kind"] == "PrometheusRule"] == [yaml.safe_load(path.read_text()) for path in rules]
    assert all(set(d["spec"]) == {"groups"} for d in of if d["kind"] == "PrometheusRule")
    dashboards = {path.name: path.read_text() for path in sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))}
    assert dashboards
    maps = [d for d in of if d["kind"] == "ConfigMap" and "trainer-job.yaml" not in d["data"]]
    assert {name: json.loads(text) for d in maps for name, text in d["data"].items()} == {name: json.loads(t) for name, t in dashboards.items()}
    assert all(d["metadata"]["labels"]["grafana_dashboard"] == "1" and len(json.dumps(d)) < 1_000_000 for d in maps)


def test_a_packaged_chart_renders_the_same(tmp_path: Path) -> None:
    with Chart.load(chart().save(tmp_path)) as packaged:
        assert packaged.render(CASES[ALL_ON], name="demo", namespace="rl") == rendered(CASES[ALL_ON])


def test_the_test_of_a_release_is_a_program_that_compiles() -> None:
    program = pods(of_case("defaults"))["test"]["spec"]["containers"][0]["args"][0]
    compile(program, "helm test", "exec")
    assert "http://demo-offbeat-control-plane:8700" in program


def test_notes_tell_how_to_reach_the_api_and_warn_of_what_is_open() -> None:
    assert "port-forward svc/demo-offbeat-control-plane 8700:8700" in rendered(SECRET)["offbeat/templates/NOTES.txt"]
    assert "https://offbeat.example.com" in rendered(FILES["multi-node"])["offbeat/templates/NOTES.txt"]
    notes = rendered(SECRET | {"networkPolicy": {"enabled": False}, "service": {"type": "LoadBalancer"}})["offbeat/templates/NOTES.txt"]
    assert notes.count("WARNING") == 2
    on_ray = rendered(CASES["ray"])["offbeat/templates/NOTES.txt"]
    assert "1 trainers of 16 ranks on 2 workers each." in on_ray
    assert "-l ray.io/cluster=demo-offbeat-trainer-0,ray.io/node-type=head -c launcher" in on_ray
    assert "get jobs -l offbeat/template=demo-offbeat-trainer -L offbeat/run" in rendered(CASES["multi-node"])["offbeat/templates/NOTES.txt"]
    assert "jobs" not in rendered(SECRET)["offbeat/templates/NOTES.txt"]
    assert "ray" not in rendered(SECRET)["offbeat/templates/NOTES.txt"].lower()
