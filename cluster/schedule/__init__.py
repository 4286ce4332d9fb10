"""Texts that make a scheduler run `masklake relabel`.

cron.py reads the schedule, kubernetes.py and snippets.py write what a scheduler takes, start.py runs in the
CronJob's pod. No ray here: texts are rendered where there is no cluster.
"""
