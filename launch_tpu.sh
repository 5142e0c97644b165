#!/usr/bin/env bash
# Trains on a Cloud TPU: asks for it, installs this checkout, runs a command on every worker and
# watches it. docs/launch.md explains each part. The TPU and its workers as functions are in
# tools/tpu_cloud.sh; tools/tpu_worker.sh is what runs on the VMs.
# shellcheck disable=SC2154  # the loop over `options` assigns these variables
# shellcheck disable=SC2034,SC1091  # tools/tpu_cloud.sh reads them
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

# shellcheck source=tools/tpu_cloud.sh
. "$(dirname "$0")/tools/tpu_cloud.sh"

# --- subcommands

babysit() {
  local was='' found
  while :; do
    ready
    if ! look; then once "no answer from every worker: $(complaint)"; pause; continue; fi
    case $given:$verdict in
      other:running) die "$name runs another command; $(here stop) ends it" ;;
      other:* | same:stopped) [ "$verdict" = bare ] || verdict=none; forget started ;;
    esac
    [ -z "$again" ] || [ "$verdict" = none ] || [ "$verdict" = bare ] || verdict=again
    case $verdict in
      bare | none)
        if install; then start || true
        elif [[ $(node) = READY* ]]; then failure "not installed on every worker"; fi ;;
      again) start || true ;;
      running) [ "$was" = running ] || say "$name runs; $(here logs) shows it" ;;
      stopped) say "the run was stopped by hand; -- COMMAND starts it again"; costs; return ;;
      0)
        found=0
        ((${#artefacts[@]} == 0)) || finished || found=$?
        case $found in
          0) complete ;;
          1) again=1 && failure "the run ended with 0, but ${artefacts[0]} is not there" ;;
          2) once "no answer about ${artefacts[0]}: $(complaint)" ;;
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
        read -rp "Delete $name ($now)? Its run loses what is younger than its checkpoint. [y/N] " sure
        [[ $sure = [yY]* ]] || die "$name stays"
      fi
      delete
      say "$name is deleted" ;;
  esac
  [ -n "$dry_run" ] || rm -rf "$state"
}

# --- the command line

exec 3>&1
subcommand=${1:-} command=() artefacts=() workdir='' workers=1 shown='' said_once='' again='' given=''
assumed=NONE assumed_verdict=none  # what a dry run takes the answers for
case $subcommand in
  up | sync | run | babysit | logs | status | stop | down) shift ;;
  -h | --help | help) usage && exit ;;
  *) wrong "name a subcommand: up, sync, run, babysit, logs, status, stop or down" ;;
esac
numbers=(max_failures=3 max_preemptions=1000 poll=30 retries=3 backoff=5 stop_seconds=300 lines=50
  max_pack=1000)
options=("${numbers[@]}" name= zone= project= type= image= extras='tpu,gcs' python=3.12 artefact= create_flags=
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
[[ $state = /* ]] || state=$PWD/$state
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

joins() { [[ " ${command[*]} " =~ ' -m coda_jax.'(train|tokenize_dataset|eval)' ' ]]; }
trains() { [[ " ${command[*]} " = *' -m coda_jax.train '* ]]; }
if [ "$subcommand" = run ] || [ "$subcommand" = babysit ]; then
  if ((${#command[@]})); then
    ! joins || [[ " ${command[*]} " = *' --distributed '* ]] || command+=(--distributed)
    given=same
    [ ! -e "$state/command" ] ||
      printf '%s\0' "${command[@]}" | cmp -s - "$state/command" || given=other
  elif [ -e "$state/command" ]; then
    while IFS= read -r -d '' o; do command+=("$o"); done <"$state/command"
    artefact=${artefact:-$(kept artefact)} shared_workdir=${shared_workdir:-$(kept shared_workdir)}
  else
    wrong "the command is missing: -- python -m coda_jax.train --config=... --workdir=gs://..."
  fi
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

trap 'say "$name goes on. $(here babysit) comes back to it;" \
    "$(here stop) ends the run, $(here down) the costs"
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
    forget started && forget failures && forget preemptions
    start || die "not started on every worker: $(complaint)"
    say "it runs; $(here logs) shows it, $(here babysit) watches it" ;;
  babysit)
    if [ -z "$dry_run" ]; then
      ! kill -0 "$(kept babysitter)" 2>/dev/null ||
        die "process $(kept babysitter) watches $name already (if not, remove $state/babysitter)"
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
