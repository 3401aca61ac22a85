import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import metrics

DOCS = Path(__file__).parent.parent / "docs"
OPERATIONS = (DOCS / "operations.md").read_text()
RULES = (DOCS / "prometheus-rules.yml").read_text()
# What is no metric in an expression of PromQL: words of the language, and what Prometheus adds itself.
LANGUAGE = {
    *("sum", "by", "rate", "increase", "changes", "histogram_quantile", "max_over_time", "unless"),
    "up",
}
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def _families() -> dict[str, str]:
    """Return the type of every metric, by the name that stands in the documents."""
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
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]|\bby \([^)]*\)', " ", re.sub(r'"[^"]*"', '""', expression))
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

    assert explained == re.findall(r"- alert: (\w+)", RULES)


def test_reasons_that_rules_name_are_those_that_are_counted() -> None:
    (reason,) = re.findall(r'reason="([^"]+)"', RULES)

    assert f'metrics.token_refused("{reason}")' in (DOCS.parent / "middleware" / "auth.py").read_text()
