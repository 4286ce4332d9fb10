"""Configurations of `ray up`, cluster/cloud/."""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from ray.autoscaler._private.util import validate_config

from cluster.cloud.aws import aws_config
from cluster.cloud.gcp import gcp_config
from cluster.cloud.ray_up import Machine
from cluster.examples import AWS, AWS_SITE, GCP, GCP_SITE, cluster
from cluster.kubernetes.pools import Pool
from schemas.errors import UsageError

CONFIGS = {
    "aws": aws_config(cluster("infer", AWS), AWS_SITE),
    "gcp": gcp_config(cluster("infer", GCP), GCP_SITE),
}


@pytest.fixture(params=["aws", "gcp"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return deepcopy(CONFIGS[request.param])


def workers(config: dict[str, Any]) -> dict[str, Any]:
    return {name: kind for name, kind in config["available_node_types"].items() if name != "head"}


def test_rays_own_check_takes_them(config: dict[str, Any]) -> None:
    validate_config(config)
    config["docker"]["run_option"] = []
    with pytest.raises(Exception, match="'run_option' was unexpected"):
        validate_config(config)


def test_there_are_as_many_workers_as_the_pools_say(config: dict[str, Any]) -> None:
    pools = {pool.name: (pool.min_nodes, pool.max_nodes) for pool in cluster("infer", AWS).pools}
    found = {name: (kind["min_workers"], kind["max_workers"]) for name, kind in workers(config).items()}
    assert found == pools
    assert config["max_workers"] == sum(most for _, most in pools.values())


def test_the_head_stays_and_spot_is_what_the_pools_say() -> None:
    aws = {
        name: kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        for name, kind in CONFIGS["aws"]["available_node_types"].items()
    }
    assert aws == {"head": None, "cpu": None, "gpu": None, "gpu-spot": "spot"}
    gcp = {
        name: kind["node_config"].get("scheduling", {}).get("provisioningModel")
        for name, kind in CONFIGS["gcp"]["available_node_types"].items()
    }
    assert gcp == {"head": None, "cpu": None, "gpu": None, "gpu-spot": "SPOT"}


def test_no_node_has_a_public_address_or_an_open_port() -> None:
    for config in CONFIGS.values():
        assert config["provider"]["use_internal_ips"] is True
        assert config["auth"]["ssh_proxy_use_node_id"] is True  # through the cloud's own proxy, by the id
    for kind in CONFIGS["aws"]["available_node_types"].values():
        # Without it Ray makes a group that is open at port 22.
        assert kind["node_config"]["SecurityGroupIds"] == [AWS_SITE.security_group]
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    for kind in CONFIGS["gcp"]["available_node_types"].values():
        (interface,) = kind["node_config"]["networkInterfaces"]
        assert "accessConfigs" not in interface


def test_the_dashboard_listens_on_the_loopback_and_everything_wants_the_token(config: dict[str, Any]) -> None:
    _, head = config["head_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-cpus=0" in head
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert not any("auth_token" in option for option in config["docker"]["run_options"])


def test_nothing_is_installed_on_a_node_and_gpu_nodes_run_their_own_image(config: dict[str, Any]) -> None:
    assert config["docker"]["image"].endswith("-cpu")
    commands = [
        config[f"{kind}commands"] for kind in ("setup_", "head_setup_", "worker_setup_", "initialization_")
    ]
    assert commands == [[], [], [], []]
    images = {name: kind.get("docker", {}).get("worker_image", "") for name, kind in workers(config).items()}
    assert images["cpu"] == ""
    assert images["gpu"].endswith("-gpu")
    assert images["gpu-spot"].endswith("-gpu")


def test_what_a_spec_may_reach_is_one_word_to_the_shell(config: dict[str, Any]) -> None:
    (option,) = (text for text in config["docker"]["run_options"] if "MASKLAKE_ALLOWED_URIS" in text)
    assert option.startswith("--env 'MASKLAKE_ALLOWED_URIS=")
    assert option.endswith("/training'")


def test_a_pool_that_its_machine_cannot_hold_is_refused() -> None:
    made = cluster("infer", AWS)
    with pytest.raises(UsageError, match="pool cpu wants nodes of 9 CPUs"):
        aws_config(replace(made, pools=(Pool("cpu", "9"),)), AWS_SITE)
    with pytest.raises(UsageError, match=r"has 8, 32Gi and 1"):
        gcp_config(replace(made, pools=(Pool("gpu", gpus=2),)), GCP_SITE)
    Machine("small", 4, 16).check_holds(Pool("cpu", "4", "16Gi"))


@pytest.fixture
def aws_account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty account of moto with the subnets, the security group and the profile of a site."""
    from moto import mock_aws

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        import boto3

        yield boto3.client("ec2", region_name=AWS_SITE.region)


@pytest.mark.slow
def test_the_launcher_makes_no_network_and_no_role_of_its_own(
    aws_account: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # it writes a key there
    vpc = aws_account.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = aws_account.create_subnet(
        VpcId=vpc, CidrBlock="10.0.0.0/24", AvailabilityZone=f"{AWS_SITE.region}a"
    )["Subnet"]["SubnetId"]
    group = aws_account.create_security_group(GroupName="own", Description="own", VpcId=vpc)["GroupId"]
    site = replace(AWS_SITE, subnets=(subnet,), security_group=group)
    groups = aws_account.describe_security_groups()["SecurityGroups"]

    made = bootstrap_aws(aws_config(cluster("infer", AWS), site))  # type: ignore[no-untyped-call]
    for kind in made["available_node_types"].values():
        assert kind["node_config"]["SecurityGroupIds"] == [group]
        assert kind["node_config"]["SubnetIds"] == [subnet]
    assert aws_account.describe_security_groups()["SecurityGroups"] == groups
    iam = boto3.client("iam", region_name=AWS_SITE.region)
    assert iam.list_roles()["Roles"] == []
