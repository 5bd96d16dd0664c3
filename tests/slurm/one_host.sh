#!/usr/bin/env bash
# A SLURM of its own on this host, for tests: munged, slurmctld and slurmd in one folder, on ports
# of their own, with accounting where MariaDB is installed. Needs root; systemd and cgroups not.
#
#   one_host.sh start FOLDER    prints what to evaluate: export SLURM_CONF=...
#   one_host.sh stop FOLDER     ends these processes, and no others, and removes the folder
#
# apt-get install --no-install-recommends slurm-wlm munge [slurmdbd mariadb-server]
# ONE_HOST_CPUS (2), ONE_HOST_MEM_MB (8000) and ONE_HOST_GPUS (0; null devices) are what it offers.
set -euo pipefail
command=${1:-} folder=${2:-}
case $command in start | stop) [ -n "$folder" ] ;; *) sed -n 2,9p "$0" >&2; exit 2 ;; esac
host=$(hostname -s)
port=$((20000 + $(printf %s "$folder" | cksum | cut -d ' ' -f 1) % 30000))
export SLURM_CONF=$folder/slurm.conf

has_accounting() { command -v slurmdbd mariadbd mariadb-install-db >/dev/null; }

write_conf() {
    local gpus=${ONE_HOST_GPUS:-0} number
    cat >"$SLURM_CONF" <<CONF
ClusterName=onehost
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmctldPidFile=$folder/slurmctld-own.pid
SlurmdPidFile=$folder/slurmd-own.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
SlurmdSpoolDir=$folder/spool
StateSaveLocation=$folder/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobRequeue=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
SchedulerParameters=sched_interval=1,bf_interval=5,batch_sched_delay=0,requeue_setup_env_fail
ReturnToService=2
KillWait=10
MinJobAge=600
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/jobcomp.txt
CONF
    if has_accounting; then
        printf 'AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n'
        printf 'AccountingStoragePort=%d\n' $((port + 2))
        # The socket of munge, for want of another option.
        printf 'AccountingStoragePass=%s\n' "$folder/munge/socket"
    else
        echo "AccountingStorageType=accounting_storage/none"
    fi >>"$SLURM_CONF"
    local gres=""
    if [ "$gpus" -gt 0 ]; then
        for number in $(seq 0 $((gpus - 1))); do mknod "$folder/gpu$number" c 1 3; done
        echo "NodeName=$host Name=gpu File=$folder/gpu[0-$((gpus - 1))]" >"$folder/gres.conf"
        echo "GresTypes=gpu" >>"$SLURM_CONF"
        # Which slurmctld refuses without slurmdbd.
        if has_accounting; then echo "AccountingStorageTRES=gres/gpu" >>"$SLURM_CONF"; fi
        gres="Gres=gpu:$gpus"
    fi
    echo "NodeName=$host NodeAddr=127.0.0.1 CPUs=${ONE_HOST_CPUS:-2}" \
        "RealMemory=${ONE_HOST_MEM_MB:-8000} $gres State=UNKNOWN" >>"$SLURM_CONF"
    echo "PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP" >>"$SLURM_CONF"
}

daemon() { # daemon NAME COMMAND...: in the background, its process id in NAME.pid
    local name=$1
    shift
    setsid "$@" >"$folder/log/$name.out" 2>&1 </dev/null &
    echo $! >"$folder/$name.pid"
}

wait_for() { # wait_for WHAT COMMAND...: at most two minutes
    local what=$1 end=$((SECONDS + 120))
    shift
    while [ $SECONDS -lt $end ]; do
        if timeout 10 "$@" >/dev/null 2>&1 </dev/null; then return; fi
        sleep 0.5
    done
    echo "one_host.sh: $what did not start; the logs' ends are:" >&2
    tail -n 8 "$folder"/log/* >&2
    exit 1
}

start_database() {
    local socket=$folder/database.socket
    mariadb-install-db --no-defaults --user=root --auth-root-authentication-method=normal \
        --datadir="$folder/database" >"$folder/log/install-db.out" 2>&1
    daemon mariadbd mariadbd --no-defaults --user=root --datadir="$folder/database" \
        --socket="$socket" --skip-networking --pid-file="$folder/mariadbd-own.pid" \
        --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-lock-wait-timeout=900
    wait_for MariaDB mariadb --no-defaults --user=root --socket="$socket" --execute="SELECT 1"
    (umask 077 && cat >"$folder/slurmdbd.conf" <<CONF)
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 2))
SlurmUser=root
LogFile=$folder/log/slurmdbd.log
PidFile=$folder/slurmdbd-own.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
CONF
    MYSQL_UNIX_PORT=$socket daemon slurmdbd slurmdbd -D
    wait_for slurmdbd sacctmgr --noheader show cluster
    sacctmgr --immediate add cluster onehost >/dev/null
}

idle() { [ "$(sinfo --noheader --format=%T)" = idle ]; }
export -f idle

start() {
    mkdir -p "$folder"/{munge,log,spool,state}
    chmod 755 "$folder" "$folder/munge"
    write_conf
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/log/munged.log" \
        --seed-file="$folder/munge/seed" >"$folder/log/munged.out" 2>&1 </dev/null
    if has_accounting; then start_database; fi
    daemon slurmctld slurmctld -D
    daemon slurmd slurmd -D -N "$host"
    wait_for SLURM bash -c idle
    echo "export SLURM_CONF=$SLURM_CONF LOGNAME=${LOGNAME:-$(id -un)}"
}

stop() {
    squeue --noheader --format=%A 2>/dev/null | xargs --no-run-if-empty scancel || true
    local name id number
    for name in slurmd slurmctld slurmdbd mariadbd munged; do
        [ -s "$folder/$name.pid" ] || continue
        id=$(cat "$folder/$name.pid")
        kill "$id" 2>/dev/null || continue
        for number in $(seq 1 60); do
            kill -0 "$id" 2>/dev/null || break
            sleep 0.25
        done
        kill -KILL "$id" 2>/dev/null || true
    done
    rm -rf "$folder"
}

$command
