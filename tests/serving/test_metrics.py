import re

from serving.metrics import Metrics, collect_metrics, render_metrics, render_replicas


def test_metrics_of_replicas_are_those_of_each_with_a_label():
    metrics = Metrics("replicated")
    metrics.generation_tokens.inc(5)
    first = collect_metrics()
    metrics.generation_tokens.inc(2)
    text = render_replicas({"a": first, "b": collect_metrics()}).decode()
    name = "tinygpt:generation_tokens_total"
    pattern = rf'^{name}{{model_name="replicated",replica="(.)"}} (.*)$'
    assert re.findall(pattern, text, re.MULTILINE) == [("a", "5.0"), ("b", "7.0")]
    # Each name is described once, and the values of one replica are what a server alone responds.
    assert text.count(f"# TYPE {name} counter") == 1
    only = render_replicas({"x": collect_metrics()}).decode()
    assert only.replace(',replica="x"', "") == render_metrics().decode()
