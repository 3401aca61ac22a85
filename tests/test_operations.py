import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from observability import metrics

DOCS = Path(__file__).parent.parent / "docs"
OPERATIONS = (DOCS / "operations.md").read_text()
RULES = (DOCS / "prometheus-rules.yml").read_text()
# Names in PromQL that are not metrics of the service: keywords, functions, and Prometheus's own `up`.
LANGUAGE = {
    *("sum", "by", "rate", "increase", "changes", "histogram_quantile", "max_over_time", "unless", "or"),
    "up",
}
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


ALERTS = re.findall(r"- alert: (\w+)", RULES)
END = 40  # minutes; each series below has one sample per minute

# Series for which an alert fires, and near misses for which it does not, in promtool's start+step x times.
FIRES: dict[str, dict[str, str]] = {
    "TasksDown": {'up{job="tasks"}': "1x37 0x2"},
    "TasksErrors": {
        'http_requests_total{status="200"}': "0+100x40",
        'http_requests_total{status="500"}': "0+2x40",
    },
    "TasksUnavailable": {
        'http_requests_total{route="/a",status="200"}': "0+100x40",
        'http_requests_total{route="/a",status="503"}': "0+6x40",
    },
    "TasksSlow": {
        'http_request_duration_seconds_bucket{route="/a",le="0.5"}': "0+98x40",
        'http_request_duration_seconds_bucket{route="/a",le="1"}': "0+100x40",
        'http_request_duration_seconds_bucket{route="/a",le="+Inf"}': "0+100x40",
    },
    "TasksDatabaseSlow": {
        'database_statement_duration_seconds_bucket{statement="list",le="0.25"}': "0+98x40",
        'database_statement_duration_seconds_bucket{statement="list",le="0.5"}': "0+100x40",
        'database_statement_duration_seconds_bucket{statement="list",le="+Inf"}': "0+100x40",
        'database_statement_duration_seconds_bucket{statement="get",le="0.25"}': "0+9999x40",
        'database_statement_duration_seconds_bucket{statement="get",le="+Inf"}': "0+9999x40",
    },
    "TasksConnectionsExhausted": {'database_connections{state="waiting"}': "0x30 1x9"},
    "TasksKeysNotFetched": {
        'key_fetches_total{instance="a",outcome="failed"}': "0+1x40",
        'key_fetches_total{instance="a",outcome="ok"}': "5x40",
        'key_fetches_total{instance="b",outcome="ok"}': "0+1x40",  # must not hide a's failures
    },
    "TasksForeignTokens": {
        f'tokens_refused_total{{instance="{instance}",reason="Token is another user\'s"}}': "0+40x40"
        for instance in "ab"
    },
    "TasksSignInsFailing": {
        f'sign_ins_failed_total{{reason="{reason}"}}': "0+40x40" for reason in ("unknown", "password")
    },
    "TasksMemoryGrowing": {'process_resident_memory_bytes{job="tasks"}': "600000000x40"},
    "TasksRestarting": {'process_start_time_seconds{job="tasks"}': "1x30 2 3 4x7"},
}
SILENT: dict[str, dict[str, str]] = {
    "TasksDown": {'up{job="tasks"}': "1x38 0x1", 'up{job="other"}': "0x40"},
    "TasksErrors": {
        'http_requests_total{status="200"}': "0+200x40",
        'http_requests_total{status="500"}': "0+1x40",
    },
    "TasksUnavailable": {
        'http_requests_total{route="/a",status="200"}': "0+100x40",
        'http_requests_total{route="/a",status="503"}': "0+4x40",
        'http_requests_total{route="/health/ready",status="503"}': "0+20x40",
    },
    "TasksSlow": {
        'http_request_duration_seconds_bucket{route="/a",le="0.5"}': "0+995x40",
        'http_request_duration_seconds_bucket{route="/a",le="1"}': "0+1000x40",
        'http_request_duration_seconds_bucket{route="/a",le="+Inf"}': "0+1000x40",
    },
    "TasksDatabaseSlow": {
        'database_statement_duration_seconds_bucket{statement="list",le="0.25"}': "0+995x40",
        'database_statement_duration_seconds_bucket{statement="list",le="0.5"}': "0+1000x40",
        'database_statement_duration_seconds_bucket{statement="list",le="+Inf"}': "0+1000x40",
    },
    "TasksConnectionsExhausted": {
        'database_connections{state="waiting"}': "0x37 1x2",
        'database_connections{state="in use"}': "10x40",
    },
    "TasksKeysNotFetched": {
        'key_fetches_total{instance="a",outcome="failed"}': "0+1x40",
        'key_fetches_total{instance="a",outcome="ok"}': "0+1x40",
    },
    "TasksForeignTokens": {
        'tokens_refused_total{reason="Token is another user\'s"}': "0+50x40",
        'tokens_refused_total{reason="Token has expired"}': "0+999x40",
    },
    "TasksSignInsFailing": {'sign_ins_failed_total{reason="password"}': "0+50x40"},
    "TasksMemoryGrowing": {
        'process_resident_memory_bytes{job="tasks"}': "400000000x40",
        'process_resident_memory_bytes{job="other"}': "600000000x40",
    },
    "TasksRestarting": {'process_start_time_seconds{job="tasks"}': "1x30 2 3x8"},
}


def promtool() -> str:
    """Return the path of promtool; skip the test without it, or fail it in CI."""
    found = shutil.which("promtool")
    if not found:
        sentence = "promtool is not installed (Debian: apt-get install --no-install-recommends prometheus)"
        if os.environ.get("CI"):
            pytest.fail(sentence)
        pytest.skip(sentence)  # not on PyPI, so the README's test command cannot install it
    return found


def prometheus_says(folder: Path, alert: str, series: dict[str, str], *, fires: bool) -> str:
    """Return promtool's verdict on *alert* after `END` minutes of *series*; empty if correct."""
    firing = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    samples = [{"labels": "{}", "value": 1}] if fires else []
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": firing, "eval_time": f"{END}m", "exp_samples": samples}],
    }
    path = folder / "test.json"  # JSON is valid YAML
    rules = [str(DOCS / "prometheus-rules.yml")]
    path.write_text(json.dumps({"rule_files": rules, "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run([promtool(), "test", "rules", path], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_prometheus_fires_every_alert_when_it_should_and_only_then(alert: str, tmp_path: Path) -> None:
    assert prometheus_says(tmp_path, alert, FIRES[alert], fires=True) == ""
    assert prometheus_says(tmp_path, alert, SILENT[alert], fires=False) == ""


def test_prometheus_loads_the_rules() -> None:
    done = subprocess.run(
        [promtool(), "check", "rules", DOCS / "prometheus-rules.yml"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(ALERTS)} rules found" in done.stdout


def _families() -> dict[str, str]:
    """Return the type of every metric by its documented name."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {family.name + ("_total" if family.type == "counter" else ""): family.type for family in families}


def _series() -> set[str]:
    return {
        name.removesuffix("_total") + suffix
        for name, kind in _families().items()
        for suffix in SUFFIXES.get(kind, ("",))
    }


def _expressions() -> list[str]:
    dashboard = json.loads((DOCS / "grafana-dashboard.json").read_text())
    in_rules = re.findall(r"^ +expr: (.+)$", RULES, re.MULTILINE)
    in_panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert (len(in_rules), len(in_panels)) == (RULES.count("- alert:"), len(dashboard["panels"]))
    assert min(len(in_rules), len(in_panels)) >= 10
    return in_rules + in_panels


def _names(expression: str) -> set[str]:
    bare = re.sub(
        r'"[^"]*"|\{[^}]*\}|\[[^]]*\]|\b(by|ignoring) \([^)]*\)', " ", re.sub(r'"[^"]*"', '""', expression)
    )
    return set(re.findall(r"[a-z_]\w*", bare)) - LANGUAGE


@pytest.mark.parametrize("expression", _expressions())
def test_rules_and_dashboard_ask_for_metrics_that_exist(expression: str) -> None:
    names = _names(expression)

    assert names <= _series()
    assert names or expression.startswith("up")
    assert expression.count("(") == expression.count(")")


def test_the_guide_explains_every_metric_with_its_type() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (counter|gauge|histogram) \|", OPERATIONS, re.MULTILINE)
    ours = {name: kind for name, kind in _families().items() if not name.startswith(("python_", "process_"))}

    documented = dict(rows)
    assert {name: documented[name] for name in documented if not name.startswith("process_")} == ours
    assert documented.items() <= _families().items()


def test_the_guide_explains_every_alert() -> None:
    explained = re.findall(r"^\| `(Tasks\w+)` \|", OPERATIONS, re.MULTILINE)

    assert explained == ALERTS


def test_reasons_that_rules_name_are_those_that_are_counted() -> None:
    (reason,) = re.findall(r'reason="([^"]+)"', RULES)

    assert f'metrics.token_refused("{reason}")' in (DOCS.parent / "middleware" / "auth.py").read_text()
