"""Grafana dashboards, made from code: `python -m monitoring.dashboards` writes monitoring/grafana/dashboards.

Needs grafana-foundation-sdk and PyYAML (`pip install 'streamkd[dev]'`); who only uses the dashboards needs neither.
"""
