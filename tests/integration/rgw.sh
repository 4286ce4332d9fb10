#!/usr/bin/env bash
# One node of Ceph with its S3 gateway on the loopback, in memory: a real S3 server for tests.
#
#   rgw.sh FOLDER PORT MON_PORT ACCESS_KEY SECRET_KEY JOB_ACCESS_KEY JOB_SECRET_KEY
#
# The first keys are of the user `test`, who owns the buckets that it makes. Those of `job` own nothing and may do
# what a bucket's policy says.
#
# Prints "ready" when http://127.0.0.1:PORT answers, and stops everything when its standard input ends, which it
# does too when whoever started it is killed. FOLDER holds configuration and logs; Debian's packages radosgw,
# ceph-mon and ceph-osd must be installed. Objects live in at most 512 MB of memory and end with the server.
set -euo pipefail

folder=$1 port=$2 mon_port=$3 access_key=$4 secret_key=$5 job_access_key=$6 job_secret_key=$7
mkdir -p "$folder"/{mon,osd,run,log}
fsid=$(cat /proc/sys/kernel/random/uuid)
export CEPH_CONF=$folder/ceph.conf

# One of everything and no replicas; no cephx, since nothing but the loopback can reach it. The OSD is
# placed by us: its own commands at start may be refused, see persist, and then it gives up.
cat >"$CEPH_CONF" <<CONF
[global]
fsid = $fsid
mon host = [v1:127.0.0.1:$mon_port]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
run dir = $folder/run
admin socket = $folder/run/\$name.asok
log file = $folder/log/\$name.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd class update on start = false
osd crush update on start = false
mon allow pool size one = true
mon warn on pool no redundancy = false
[mon.a]
mon data = $folder/mon
[osd.0]
osd data = $folder/osd
osd objectstore = memstore
memstore device bytes = 536870912
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:$port
rgw thread pool size = 64
CONF

children=()
stop() { # nothing here is worth saving: a second to end by themselves, and no goodbyes after that
    trap - EXIT
    kill "${children[@]}" || true
    for ((i = 0; i < 10; i++)); do
        sleep 0.1
        kill -0 "${children[@]}" || break
    done
    kill -9 "${children[@]}" || true
    wait
} 2>/dev/null
trap stop EXIT
trap 'exit 1' INT TERM
trap 'echo "rgw.sh: line $LINENO failed: $BASH_COMMAND" >&2' ERR

daemon() { # daemon NAME COMMAND…: in the foreground of a job of ours, so that its pid is ours to stop
    local name=$1
    shift
    "$@" -f </dev/null >"$folder/log/$name.out" 2>&1 &
    children+=("$!")
}

alive() { # a daemon that died at its start leaves its reason in its log
    for pid in "${children[@]}"; do
        kill -0 "$pid" 2>/dev/null || { tail -v -n 5 "$folder"/log/*.out >&2; exit 1; }
    done
}

persist() { # persist COMMAND…: one that comes before its client has learnt the cluster's fsid gets EPERM
    local i
    for ((i = 0; i < 20; i++)); do
        "$@" >>"$folder/log/admin.out" 2>&1 && return
        alive
        sleep 0.5
    done
    tail -v -n 5 "$folder/log/admin.out" >&2
    exit 1
}

monmaptool --create --addv a "[v1:127.0.0.1:$mon_port]" --fsid "$fsid" "$folder/monmap" >/dev/null
ceph-mon --mkfs -i a --monmap "$folder/monmap"
daemon mon ceph-mon -i a
osd_uuid=$(cat /proc/sys/kernel/random/uuid)
persist ceph --connect-timeout 30 osd new "$osd_uuid"
ceph-osd -i 0 --mkfs --osd-uuid "$osd_uuid" >"$folder/log/mkfs.out" 2>&1
persist ceph osd crush add 0 1.0 host=here root=default
daemon osd ceph-osd -i 0
daemon rgw radosgw -n client.rgw.a
for ((i = 0; i < 480; i++)); do
    alive
    if (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then break; fi
    sleep 0.25
done
persist radosgw-admin user create --uid=test --display-name=test \
    --access-key="$access_key" --secret-key="$secret_key"
persist radosgw-admin user create --uid=job --display-name=job --max-buckets=-1 \
    --access-key="$job_access_key" --secret-key="$job_secret_key"
echo ready
cat >/dev/null
