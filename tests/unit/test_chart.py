"""The Helm chart, by the real Helm as a library: it lints, renders and validates with every values file, and nothing in it is without effect."""

import copy
import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python import HelmError
from helm_python.chart import Chart, lint

from services.runtime.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "offbeat"
KUBERNETES = "1.37"
OLDEST_KUBERNETES = "1.29"
NOT_OF_KUBERNETES = {"PodMonitor", "PrometheusRule", "ScaledJob", "ScaledObject"}
"""Kinds of operators: there is no schema for them."""
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
SECRET = {"existingSecret": "offbeat"}
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
    """Pod, with metadata and spec, by component."""
    found = [d for d in of if d["kind"] == "Pod"] + [d["spec"]["template"] for d in of if d["kind"] in {"Deployment", "StatefulSet"}]
    found += [d["spec"]["jobTargetRef"]["template"] for d in of if d["kind"] == "ScaledJob"]
    return {pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod for pod in found}


def named(of: list[Document], kind: str, component: str) -> Document:
    (found,) = [d for d in of if d["kind"] == kind and d["metadata"]["labels"]["app.kubernetes.io/component"] == component]
    return found


def environment(pod: Document) -> dict[str, Any]:
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in pod["spec"]["containers"][0]["env"]}


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
    assert set(FILES) == {"cpu", "gpu-1", "gpu-8", "multi-node"}


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
    candidates = ["other", "7", "7s", "redis://other:6379/0", "http://other"]
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
        "test": {"token"},
    }
    found = pods(of_case(case))
    assert set(found) == set(keys) - ({"redis"} if case == "external-redis" else set())
    for component, pod in found.items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
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


def test_nothing_needs_rights_in_the_cluster() -> None:
    for case in CASES:
        assert not {d["kind"] for d in of_case(case)} & {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding", "Secret"}


@pytest.mark.parametrize("case", CASES)
def test_what_pods_are_told_is_what_processes_read(case: str) -> None:
    read = {f"OFFBEAT_{name.upper()}" for name in Settings.model_fields} | {"OFFBEAT_URL", "OMP_NUM_THREADS"}
    for component, pod in pods(of_case(case)).items():
        if component not in {"redis", "test"}:
            told = environment(pod)
            assert set(told) <= read
            assert told["OFFBEAT_ADVERTISE"] == {"fieldRef": {"fieldPath": "status.podIP"}}
            mounted = {mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
            files = [Path(value) for name, value in told.items() if name.endswith("_FILE")]
            assert {str(path.parent) for path in files} <= mounted
            assert ("/data" in mounted) == (component in {"control-plane", "trainer"})


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
                assert len(containers) == 4
                for endpoint in spec["podMetricsEndpoints"]:
                    assert all(endpoint["port"] in {port["name"] for port in container["ports"]} for container in containers)
    assert policies == set(labels)
    as_jobs = {"trainer"} if case == "multi-node" else set()
    assert budgets == set(labels) - {"test"} - as_jobs
    assert services == set(labels) & {"redis", "control-plane", "trainer"} - as_jobs


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


def test_a_job_is_a_trainer_that_ends_after_one_run() -> None:
    scaled = named(of_case("multi-node"), "ScaledJob", "trainer")["spec"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "trainer"}, "spec": scaled["jobTargetRef"]}
    assert complaints([job]) == []
    assert scaled["maxReplicaCount"] == 4
    assert 'offbeat_runs{namespace="rl", state=~"queued|starting|running"}' in scaled["triggers"][0]["metadata"]["query"]
    as_job, as_replica = (pods(of_case(case))["trainer"] for case in ("multi-node", "gpu-8"))
    assert environment(as_job).pop("OFFBEAT_TRAINER_RUNS") == "1"
    assert set(environment(as_job)) - set(environment(as_replica)) == {"OFFBEAT_TRAINER_RUNS"}
    assert "StatefulSet" not in {d["kind"] for d in of_case("multi-node") if d["metadata"]["name"].endswith("trainer")}


def test_rules_and_dashboards_are_those_of_the_repository() -> None:
    of = of_case("multi-node")
    rules = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yaml"))
    assert rules
    assert [d["spec"] for d in of if d["kind"] == "PrometheusRule"] == [yaml.safe_load(path.read_text()) for path in rules]
    assert all(set(d["spec"]) == {"groups"} for d in of if d["kind"] == "PrometheusRule")
    dashboards = {path.name: path.read_text() for path in sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))}
    assert dashboards
    maps = [d for d in of if d["kind"] == "ConfigMap"]
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
