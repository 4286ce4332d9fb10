"""Parts of PromQL that alerts and panels share.

Sums go by CLUSTER, a label that the PodMonitor adds: one Prometheus may scrape many clusters. Where there is
no such label there is one group, as there should be.
"""

from cluster import metrics

CLUSTER = "ray_io_cluster"
# Names that Ray Data gives its stages in 2.60; tests/cluster/test_monitoring.py reads them from a run.
LABEL_STAGE = '{operator=~"MapBatches\\\\(_LabelActor\\\\).*"}'


def per_cluster(expression: str, *labels: str) -> str:
    """Summed over the processes of a cluster."""
    return f"sum by ({', '.join((CLUSTER, *labels))}) ({expression})"


def newest(metric: metrics.Metric, *labels: str) -> str:
    """A gauge of a driver: one process sets it, and one that went before may be there for 20 s more."""
    return f"max by ({', '.join((CLUSTER, *labels))}) ({metric.exported})"


def oldest(metric: metrics.Metric) -> str:
    """A time that drivers note, of the one that noted it longest ago."""
    return f"min by ({CLUSTER}) ({metric.exported})"


def grown(name: str, window: str, *labels: str) -> str:
    """How much a counter grew, from 0 where it was not there before, which increase() would leave out."""
    before = per_cluster(f"{name} offset {window}", *labels)
    now = per_cluster(name, *labels)
    return f"{now} - ({before} or {now} * 0)"


def rate(metric: metrics.Metric, window: str, *labels: str) -> str:
    """A counter's growth a second."""
    return per_cluster(f"rate({metric.exported}[{window}])", *labels)


ACTORS = per_cluster(f"ray_data_num_alive_actors{LABEL_STAGE}")
PENDING_ACTORS = per_cluster(f"ray_data_num_pending_actors{LABEL_STAGE}")
UNITS_WAITING = (
    f"{per_cluster(f'ray_data_num_external_inqueue_blocks{LABEL_STAGE}')}"
    f" + {per_cluster(f'ray_data_obj_store_mem_internal_inqueue_blocks{LABEL_STAGE}')}"
)
RESTARTING_ACTORS = per_cluster(f"ray_data_num_restarting_actors{LABEL_STAGE}")
IDLE_GPUS = per_cluster('ray_resources{Name="GPU", State="AVAILABLE"}')
GPUS = per_cluster('ray_resources{Name="GPU"}')
SPILLED_BYTES = per_cluster('ray_object_store_memory{Location="SPILLED"}')


def busy_share(window: str) -> str:
    """Of the actors' time, the share in the network; 0 to 1."""
    return f"{rate(metrics.NETWORK_SECONDS, window)} / ({ACTORS} > 0)"
