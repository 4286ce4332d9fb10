"""Manifests of Kubernetes and KubeRay, rendered from one description of a cluster.

pools.py describes it, pods.py and ray_job.py turn it into a RayJob, cron_job.py puts a schedule around that,
kueue.py the queue before it, spec_map.py is how the spec travels, yaml_text.py the text. No ray here: texts
are rendered where there is no cluster.
"""
