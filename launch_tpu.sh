#!/usr/bin/env bash
# Trains on a Cloud TPU: asks for it, installs this checkout, runs a command on every worker and
# watches it. docs/launch.md explains each part; tools/tpu_worker.sh is the part that runs on the VMs.
# shellcheck disable=SC2154  # the loop over `options` assigns these variables
# shellcheck disable=SC2086  # the variables of flags are words
set -euo pipefail

usage() {
  cat <<'END'
usage: ./launch_tpu.sh SUBCOMMAND --name NAME --zone ZONE --type TYPE [options] [-- COMMAND...]

  up       asks for the TPU and waits until it is ready
  sync     packs this checkout and installs it on every worker
  run      starts COMMAND on every worker and leaves it running
  babysit  does all of these and watches; makes a preempted TPU anew and runs COMMAND again
  logs     prints the last lines of every worker's log: --lines 50, --follow
  status   lists what the zone holds, what of it costs money, and how the run is
  stop     tells the run to save and end; the TPU stays
  down     deletes the TPU; asks before, or takes --yes

  --dry-run prints every command and runs none. --project P, --spot or --reserved, --image VERSION,
  --shared-workdir, --artefact PATH, --down and all others are in docs/launch.md.
  Each is a variable too: --max-failures is LAUNCH_MAX_FAILURES.
END
}

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&3; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
wrong() { printf 'launch_tpu.sh: error: %s (--help lists the options)\n' "$*" >&2; exit 2; }
here() { echo "./launch_tpu.sh $1 --name $name --zone $zone --project $project"; }
kept() { cat "$state/$1" 2>/dev/null || true; }
keep() { [ -n "$dry_run" ] || echo "$2" >"$state/$1"; }
forget() { [ -n "$dry_run" ] || rm -f "$state/$1"; }
pause() { [ -n "$dry_run" ] || { sleep "$poll" >/dev/null 2>&1 3>&- & wait $!; }; }

quoted() {  # ARGUMENT...: each with a space before it, as a shell reads it
  local a
  for a in "$@"; do
    case $a in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) printf " '%s'" "$(printf %s "$a" | sed "s/'/'\\\\''/g")" ;;
      *) printf ' %s' "$a" ;;
    esac
  done
}

retry() {  # COMMAND...: with growing pauses
  local i seconds=$backoff
  for ((i = 1; ; i++)); do
    "$@" && return
    say "$1 failed ($i of $retries): $(complaint)"
    ((i < retries)) || return 1
    sleep "$seconds" && seconds=$((2 * seconds))
  done
}

# --- the TPU

cloud() {
  if [ -n "$dry_run" ]; then printf '+%s\n' "$(quoted gcloud "$@")" >&3; return; fi
  gcloud "$@" </dev/null 2>"$errors"
}
complaint() { grep -v '^ *$' "$errors" | tail -n 3 | tr '\n' ' ' || true; }
missing() { grep -qiE 'not.?found|no objects' "$errors"; }

asked() {  # queued-resources|tpu-vm FORMAT ASSUMED_IN_A_DRY_RUN; NONE where there is none
  if cloud compute tpus "$1" describe "$name" "${where[@]}" --format="value($2)"; then
    [ -z "$dry_run" ] || echo "$3"
  elif missing; then echo NONE
  else echo UNKNOWN; fi
}
request() { asked queued-resources state.state "$assumed"; }
node() { asked tpu-vm 'state,networkEndpoints.len()' 'READY 1'; }

create() {
  local of_tier=()
  [ "$tier" = on-demand ] || of_tier=("--$tier")
  say "asks for $name: $type in $zone, $tier, image $image"
  cloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$image" --labels=launched_by=coda_jax \
    ${of_tier[@]+"${of_tier[@]}"} $create_flags || return 1
  assumed=ACTIVE
  keep type "$type" && keep tier "$tier" && keep image "$image"
}

delete() {
  [ -n "$(kept image)" ] ||
    [ "$(asked queued-resources 'tpu.nodeSpec[0].node.labels.launched_by' coda_jax)" = coda_jax ] ||
    die "$name was not made by this script and stays; to delete it:$(quoted gcloud "${remove[@]}")"
  retry delete_request || die "$name could not be deleted: $(complaint)"
  assumed=NONE
}
delete_request() { cloud "${remove[@]}" || missing; }

ready() {  # makes the TPU if it is not there, and waits until its workers are READY
  local was='' now message
  while :; do
    now=$(request)
    if [ "$now" = ACTIVE ]; then
      read -r now workers <<<"$(node)"
      now="ACTIVE, node $now"
    fi
    [ "$now" = "$was" ] || say "$name: $now$(case $now in *UNKNOWN) echo ", $(complaint)" ;; esac)"
    was=$now
    case $now in
      'ACTIVE, node READY') return ;;
      NONE)
        ! finished_before || complete
        create && continue
        message=$(complaint)
        if grep -qiE 'quota|resource_exhausted' "$errors"; then
          message="quota exceeded: $message(more: console, IAM > Quotas; or another type, zone or tier)"
          [ -n "$(kept image)" ] || give_up "$message"  # never had it: asking again does not help
        fi
        failure "$name was not created: $message" ;;
      FAILED)
        failure "$name FAILED: $(asked queued-resources state.failedData.error.message '')"
        delete ;;
      SUSPENDED | *PREEMPTED | *TERMINATED | *STOPPED | *NONE)  # it never comes back
        ! finished_before || complete
        preemption "$name is $now"
        delete ;;
    esac  # ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, node CREATING, UNKNOWN...: wait
    pause
  done
}

there() {
  local now
  read -r now workers <<<"$(node)"
  [ "$now" = READY ] || die "$name is $now, not READY; $(here up) makes it or waits for it $(complaint)"
}

# --- the workers

on_workers() {  # COMMAND: prints the workers' lines; every worker has to answer '@worker HOST ...'
  local said
  said=$(cloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all $ssh_flags \
    --command="$1") || return 1
  if [ -z "$dry_run" ] && [ "$(grep -c ^@worker <<<"$said")" -lt "$workers" ]; then
    printf '%s\n' "$said" >&3
    return 1
  fi
  printf '%s\n' "$said"
}
task() { on_workers "bash coda_jax/tools/tpu_worker.sh$(quoted "$@")"; }
upload() {
  cloud compute tpus tpu-vm scp "$state/checkout.tgz" "$name:coda_checkout.tgz" "${where[@]}" \
    --worker=all $scp_flags >/dev/null
}
unpack() {
  on_workers "mkdir -p coda_jax && rm -rf coda_jax/coda_jax coda_jax/configs coda_jax/convert &&
    tar -xzf coda_checkout.tgz -C coda_jax &&
    bash coda_jax/tools/tpu_worker.sh install$(quoted "$extras" "$python")" >/dev/null
}

pack() {  # what git tracks and what is new, not what it ignores
  say "packs this checkout"
  local list=(git ls-files -z --cached --others --exclude-standard) file
  git rev-parse 2>/dev/null || list=(find . -type d \( -name .venv -o -name .git -o -name runs \) -prune -o -type f -print0)
  if [ -n "$dry_run" ]; then echo "+$(quoted "${list[@]}") | tar -czf $state/checkout.tgz --null -T -" >&3; return; fi
  "${list[@]}" | while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    COPYFILE_DISABLE=1 tar -czf "$state/checkout.tgz" --null -T -
}
install() {  # after a preemption the checkout of before, not what was changed since
  [ -e "$state/checkout.tgz" ] || pack
  say "installs it on all workers ($workers)"
  retry upload && retry unpack
}

start() {
  local before=run
  [ -n "$dry_run$(kept started)" ] || ! finished || before=result  # of a run that now gets longer
  say "starts on all workers ($workers):$(quoted "${command[@]}")"
  retry task start "${command[@]}" >/dev/null || return 1
  [ -n "$dry_run" ] || printf '%s\0' "${command[@]}" >"$state/command"
  [ -n "$(kept started)" ] || keep started "$before"
  assumed_verdict=0 again=
}

look() {  # sets verdict: bare, none, running, stopped, lost or an exit code; fails if a worker is silent
  local said
  # shellcheck disable=SC2016  # the VM's shell expands it
  said=$(on_workers 'if [ -f coda_jax/tools/tpu_worker.sh ]; then
    bash coda_jax/tools/tpu_worker.sh state; else echo "@worker $(hostname) bare"; fi') || return 1
  # A worker that fails takes others with it: preemptions and wrong usage count before other codes.
  verdict=$assumed_verdict
  [ -n "$dry_run" ] || verdict=$(awk '
    $1 == "@worker" { n[$3]++; if ($3 == "ended" && $4 != 0) { n[$4]++; code = $4 } }
    END { split("bare none stopped 2 75 lost", first)
      for (i = 1; i <= 6; i++) if (first[i] in n) { print first[i]; exit }
      print code ? code : "running" in n ? "running" : 0 }' <<<"$said")
}

finished() {  # 0: an artefact is there, 1: none is, 2: no answer
  local a said
  case ${artefacts[0]:-} in
    '') return 1 ;;
    gs://*)
      for a in "${artefacts[@]}"; do
        cloud storage ls "$a" --project="$project" >/dev/null && return
        missing || return 2
      done
      return 1 ;;
  esac
  said=$(cloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 $ssh_flags \
    --command="cd coda_jax && ls$(quoted "${artefacts[@]}") 2>/dev/null; echo @worker") || return 2
  [ -n "$dry_run" ] || grep -q '^[^@]' <<<"$said"
}
finished_before() { [ "$(kept started)" = run ] && [[ ${artefacts[0]:-} = gs://* ]] && finished; }

# --- ends

costs() { say "$name is there and costs money until: $(here down)"; }
complete() {
  say "done: ${artefacts[*]:-exit code 0}"
  forget started
  if [ -n "$down" ]; then say "deletes $name" && delete; else costs; fi
  exit 0
}
give_up() {
  [ "$subcommand" != babysit ] || [ -z "$down" ] || { say "deletes $name" && delete; }
  die "gave up: $* (what costs money: $(here status))"
}
bump() { keep "$1" $(($(kept "$1") + 1)) && kept "$1"; }
failure() {
  local n
  n=$(bump failures)
  say "failure $n of $max_failures: $*"
  ((n < max_failures)) || give_up "$*"
}
preemption() {
  local n
  n=$(bump preemptions)
  say "preemption $n: $*"
  ((n < max_preemptions)) || give_up "$n preemptions"
}
last_lines() { { task log 20 | grep -v ^@worker | head -n 100 >&3; } || true; }

# --- subcommands

babysit() {
  local was='' found
  while :; do
    ready
    if ! look; then say "no answer from every worker: $(complaint)"; pause; continue; fi
    case $given:$verdict in
      other:running) die "$name runs another command; $(here stop) ends it" ;;
      other:* | same:stopped) [ "$verdict" = bare ] || verdict=none; forget started ;;
    esac
    [ -z "$again" ] || [ "$verdict" = none ] || [ "$verdict" = bare ] || verdict=again
    case $verdict in
      bare | none) if install; then start || true; fi ;;
      again) start || true ;;
      running) [ "$was" = running ] || say "$name runs; $(here logs) shows it" ;;
      stopped) say "the run was stopped by hand; -- COMMAND starts it again"; costs; return ;;
      0)
        found=0
        ((${#artefacts[@]} == 0)) || finished || found=$?
        case $found in
          0) complete ;;
          1) again=1 && failure "the run ended with 0, but ${artefacts[0]} is not there" ;;
          2) say "no answer about ${artefacts[0]}: $(complaint)" ;;
        esac ;;
      75) again=1 && preemption "the run was told to stop, and saved" ;;
      lost) again=1 && preemption "a VM has restarted" ;;
      2) last_lines && give_up "the command's usage is wrong (exit code 2)" ;;
      *) again=1 && last_lines && failure "the run ended with $verdict" ;;
    esac
    given='' was=$verdict
    pause
  done
}

status() {
  local n s t
  say "queued resources in $zone of $project:"
  cloud compute tpus queued-resources list "${where[@]}" \
    --format='table(name.basename(),state.state,tpu.nodeSpec[0].node.acceleratorType:label=TYPE)' ||
    die "gcloud: $(complaint)"
  cloud compute tpus tpu-vm list "${where[@]}" \
    --format='value(name.basename(),state,acceleratorType.basename())' | while read -r n s t; do
    case $s in
      PREEMPTED | TERMINATED | STOPPED) say "$n, $t, $s: costs nothing" ;;
      *) say "$n, $t, $s: costs money" ;;
    esac
  done
  [ -n "$name" ] || return 0
  read -r s workers <<<"$(node)"
  [ "$s" = READY ] || return 0
  if look; then say "the run on $name: $verdict"; else say "no answer from every worker of $name"; fi
}

down() {
  local now sure
  now=$(request)
  case $now in
    NONE) say "$name is not there: nothing to delete" ;;
    UNKNOWN) die "gcloud: $(complaint)" ;;
    *)
      if [ -z "$yes$dry_run" ]; then
        [ -t 0 ] || die "down asks before it deletes $name; add --yes"
        read -rp "$name is $now. Its run loses what it did since the last checkpoint. Delete? [y/N] " sure
        [[ $sure = [yY]* ]] || die "$name stays"
      fi
      delete
      say "$name is deleted" ;;
  esac
  [ -n "$dry_run" ] || rm -rf "$state"
}

# --- the command line

exec 3>&1
subcommand=${1:-} command=() artefacts=() assumed=NONE assumed_verdict=none again='' given='' workers=1
case $subcommand in
  up | sync | run | babysit | logs | status | stop | down) shift ;;
  -h | --help | help) usage && exit ;;
  *) wrong "name a subcommand: up, sync, run, babysit, logs, status, stop or down" ;;
esac
numbers=(max_failures=3 max_preemptions=1000 poll=30 retries=3 backoff=5 stop_seconds=300 lines=50)
options=("${numbers[@]}" name= zone= project= type= image= extras=tpu python=3.12 artefact= create_flags=
  ssh_flags='--ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=15'
  scp_flags=--scp-flag=-oConnectTimeout=20 state="${XDG_STATE_HOME:-$HOME/.local/state}/launch_tpu")
for o in "${options[@]}" tier= shared_workdir= down= yes= dry_run= follow=; do
  variable=LAUNCH_$(tr '[:lower:]' '[:upper:]' <<<"${o%%=*}")
  printf -v "${o%%=*}" %s "${!variable-${o#*=}}"
done
while (($#)); do
  key=${1#--}
  key=${key//-/_}
  case $1 in
    --) shift && command=("$@") && break ;;
    --help) usage && exit ;;
    --spot | --reserved | --on-demand) tier=${1#--} ;;
    --shared-workdir | --down | --yes | --dry-run | --follow) printf -v "$key" 1 ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    --*)
      [[ " ${options[*]}" = *" $key="* ]] || wrong "unknown option $1"
      (($# > 1)) || wrong "$1 needs a value"
      printf -v "$key" %s "$2" && shift ;;
    *) wrong "unexpected $1; the command to run stands after --" ;;
  esac
  shift
done
for o in "${numbers[@]}"; do
  key=${o%%=*}
  [[ ${!key} =~ ^[0-9]+$ ]] || wrong "--${key//_/-}=${!key} is not a whole number"
done
[ "$subcommand$name" = status ] || [[ $name =~ ^[a-z][-a-z0-9]*$ ]] ||
  wrong "--name=$name: a name of small letters, digits and - is needed"
cd "$(dirname "$0")"

# What is missing is said before anything is made.
if command -v gcloud >/dev/null; then
  project=${project:-$(gcloud config get-value project 2>/dev/null)}
  zone=${zone:-$(gcloud config get-value compute/zone 2>/dev/null)}
elif [ -z "$dry_run" ]; then
  die "gcloud is not on PATH: install https://cloud.google.com/sdk/docs/install, then gcloud auth login"
fi
[ -n "$project" ] || die "no project: add --project P, or gcloud config set project P"
[ -n "$zone" ] || die "no zone: add --zone Z (gcloud compute tpus locations list shows them)"
where=(--zone="$zone" --project="$project" --quiet)
remove=(compute tpus queued-resources delete "$name" "${where[@]}" --force)
state=$state/${project//:/_}.$zone.$name
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
if [ -z "$dry_run" ]; then
  mkdir -p "$state"
  cloud auth print-access-token >/dev/null || die "gcloud has no account: run gcloud auth login"
fi

type=${type:-$(kept type)} tier=${tier:-$(kept tier)} image=${image:-$(kept image)}
tier=${tier:-on-demand}
case $type in
  tpu7x* | v7x* | ironwood*)
    die "$type needs Compute Engine or GKE: docs/launch.md, https://cloud.google.com/tpu/docs/tpu7x" ;;
  v6e-*) image=${image:-v2-alpha-tpuv6e} ;;
  v5p-*) image=${image:-v2-alpha-tpuv5} ;;
  v5litepod-*) image=${image:-v2-alpha-tpuv5-lite} ;;
  v4-*) image=${image:-tpu-ubuntu2204-base} ;;
  v5e-*) wrong "--type=$type: queued resources call it v5litepod-${type#*-}" ;;
esac
if [ "$subcommand" = up ] || [ "$subcommand" = babysit ]; then
  [ -n "$type" ] || wrong "--type is needed: v4-8, v5litepod-16, v5p-8, v6e-8, ..."
  [ -n "$image" ] || wrong "--type=$type is not v4-, v5litepod-, v5p- or v6e-; add --image VERSION"
fi

trains() { [[ " ${command[*]} " = *' -m coda_jax.train '* ]]; }
if [ "$subcommand" = run ] || [ "$subcommand" = babysit ]; then
  if ((${#command[@]})); then
    ! trains || [[ " ${command[*]} " = *' --distributed '* ]] || command+=(--distributed)
    given=other
    ! printf '%s\0' "${command[@]}" | cmp -s - "$state/command" || given=same
  elif [ -e "$state/command" ]; then
    while IFS= read -r -d '' o; do command+=("$o"); done <"$state/command"
  else
    wrong "the command is missing: -- python -m coda_jax.train --config=... --workdir=gs://..."
  fi
  workdir=
  for ((i = 0; i < ${#command[@]}; i++)); do
    case ${command[i]} in
      --workdir=*) workdir=${command[i]#*=} ;;
      --workdir) workdir=${command[i + 1]:-} ;;
    esac
  done
  if [ -n "$artefact" ]; then artefacts=("$artefact")
  elif [ -n "$workdir" ]; then artefacts=("${workdir%/}"/{tokenizer,generator}/config.json)
  elif trains; then wrong "add --workdir=... to the command: what lies there tells when it is done"; fi
  if [[ $workdir = gs://* ]]; then
    bucket=$(cut -d/ -f1-3 <<<"$workdir")
    cloud storage ls "$bucket" --project="$project" >/dev/null ||
      die "$bucket cannot be listed: $(complaint)(gcloud storage buckets create $bucket makes it)"
  elif [ -n "$workdir" ] && [ -z "$shared_workdir" ]; then
    [[ ! ${type##*-} =~ ^[0-9]+$ ]] || ((${type##*-} <= 8)) ||
      die "--workdir=$workdir would lie on each VM alone, and $type has several:" \
        "take gs://BUCKET/..., or a mounted folder with --shared-workdir"
    [ "$tier" != spot ] || say "note: a preemption deletes --workdir=$workdir, which lies on the VM"
  fi
fi

trap 'say "$name goes on. $(here babysit) comes back to it; $(here stop) ends the run, $(here down) the costs"
  exit 130' INT TERM
case $subcommand in
  up)
    forget failures
    max_failures=1
    ready
    costs ;;
  sync) there && pack && install ;;
  run)
    there
    look || die "no answer from every worker: $(complaint)"
    case $verdict in
      bare) die "$name has no checkout yet; $(here sync) installs it" ;;
      running) die "$name runs already; $(here stop) ends it" ;;
    esac
    forget started
    start || die "not started on every worker: $(complaint)"
    say "it runs; $(here logs) shows it, $(here babysit) watches it" ;;
  babysit)
    if [ -z "$dry_run" ]; then
      ! kill -0 "$(kept babysitter)" 2>/dev/null ||
        die "process $(kept babysitter) watches $name already (if it does not, remove $state/babysitter)"
      keep babysitter $$
      trap 'rm -f "$errors" "$state/babysitter"' EXIT
      [ -z "$given" ] || { forget failures && forget preemptions; }
    fi
    babysit ;;
  logs)
    there
    if [ -z "$follow" ]; then
      task log "$lines" | grep -v ^@worker || [ -n "$dry_run" ] || die "no log: $(complaint)"
    else
      cloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all $ssh_flags \
        --command="bash coda_jax/tools/tpu_worker.sh follow $lines"
    fi ;;
  stop)
    there
    say "tells the run to save and end, and waits up to $stop_seconds seconds"
    retry task stop "$stop_seconds" >/dev/null || die "not every worker answered: $(complaint)"
    costs ;;
  *) "$subcommand" ;;
esac
