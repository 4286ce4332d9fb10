#!/usr/bin/env bash
# One node of Ceph with its S3 gateway on the loopback, in memory: a real S3 server for tests.
#
#   rgw.sh FOLDER PORT MON_PORT ACCESS_KEY SECRET_KEY
#
# Prints "ready" when http://127.0.0.1:PORT answers, and stops everything when its standard input ends, which it
# does too when whoever started it is killed. FOLDER holds configuration and logs; Debian's packages radosgw,
# ceph-mon and ceph-osd must be installed. Objects live in at most 512 MB of memory and end with the server.
set -euo pipefail

folder=$1 port=$2 mon_port=$3 access_key=$4 secret_key=$5
mkdir -p "$folder"/{mon,osd,run,log}
fsid=$(cat /proc/sys/kernel/random/uuid)
export CEPH_CONF=$folder/ceph.conf

# One of everything and no replicas; no cephx, since nothing but the loopback can reach it.
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
stop() {
    trap - EXIT
    for ((i = ${#children[@]} - 1; i >= 0; i--)); do
        kill "${children[i]}" 2>/dev/null || true
        # A gateway takes 5 s to say goodbye to its cluster; nothing here is worth waiting for.
        (sleep 2 && kill -9 "${children[i]}" 2>/dev/null) &
    done
    wait
}
trap stop EXIT
trap 'exit 1' INT TERM

daemon() { # daemon NAME COMMAND…: in the foreground of a job of ours, so that its pid is ours to stop
    local name=$1
    shift
    "$@" -f </dev/null >"$folder/log/$name.out" 2>&1 &
    children+=("$!")
}

alive() { # a daemon that died at its start leaves its reason in its log
    for pid in "${children[@]}"; do
        kill -0 "$pid" 2>/dev/null || { tail -n 5 "$folder"/log/*.out >&2; exit 1; }
    done
}

monmaptool --create --addv a "[v1:127.0.0.1:$mon_port]" --fsid "$fsid" "$folder/monmap" >/dev/null
ceph-mon --mkfs -i a --monmap "$folder/monmap"
daemon mon ceph-mon -i a
ceph --connect-timeout 30 osd new "$(cat /proc/sys/kernel/random/uuid)" >"$folder/osd-id"
ceph-osd -i 0 --mkfs --osd-uuid "$(ceph osd dump --format json | sed -E 's/.*"osd":0,"uuid":"([^"]+)".*/\1/')" \
    >"$folder/log/mkfs.out" 2>&1
ceph osd crush add 0 1.0 host=here root=default 2>/dev/null
daemon osd ceph-osd -i 0
daemon rgw radosgw -n client.rgw.a
for ((i = 0; i < 480; i++)); do
    alive
    if (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then break; fi
    sleep 0.25
done
radosgw-admin user create --uid=test --display-name=test \
    --access-key="$access_key" --secret-key="$secret_key" >/dev/null 2>"$folder/log/user.out"
echo ready
cat >/dev/null
