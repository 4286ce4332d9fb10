"""What Prometheus and Grafana are to be told: where to scrape, when to alert, what to draw.

alerts.py and dashboard.py ask for metrics by name (cluster/metrics.py, and Ray's own); pod_monitor.py says
where they are; files.py is all of it as files. No ray here: texts are rendered where there is no cluster.
"""
