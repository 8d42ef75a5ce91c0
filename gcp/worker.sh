#!/usr/bin/env bash
# Runs on each host of a slice, in the folder that the launch folder of the bucket was copied to.
#
#   worker.sh install    install t5jax, or pull the image; does nothing if that is done
#   worker.sh start      start run.sh as a service; does nothing if it runs
#   worker.sh status     one line: t5jax-status HOST running|finished|failed|stopping|none DETAIL
#   worker.sh log        the last lines of the log, then each new one
#   worker.sh tail       the last lines of the log
#   worker.sh stop       end the service by SIGTERM, and wait until it has ended; forget a failure
#
# The service outlives the connection that started it, and there is one at a time.
set -euo pipefail
umask 077
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly unit=t5jax
readonly secrets=/run/t5jax.env
# shellcheck source=/dev/null # IMAGE, SECRET_NAMES (lines of NAME=SECRET), PROJECT, UV_VERSION
source ./launch.env

say() {
  printf '%s: %s\n' "$(hostname)" "$1" >&2
}

property() {
  systemctl show "$unit" --property="$1" --value 2>/dev/null || true
}

state() {
  case "$(property ActiveState)/$(property SubState)" in
    active/exited) echo finished ;;
    active/* | activating/* | reloading/*) echo running ;;
    deactivating/*) echo stopping ;;
    failed/*) echo failed ;;
    *) echo none ;;
  esac
}

install_from_lock() {
  local lock wheel
  wheel=$(echo "$PWD"/t5jax-*.whl)
  lock=$(cat constraints.txt "$wheel" | sha256sum)
  if [[ -f .installed && $(<.installed) == "$lock" ]]; then
    say "installed already"
    return
  fi
  rm -f .installed
  if [[ ! -x .uv/uv ]]; then
    curl --fail --silent --show-error --location --retry 5 \
      "https://astral.sh/uv/$UV_VERSION/install.sh" |
      UV_UNMANAGED_INSTALL="$PWD/.uv" sh
  fi
  .uv/uv venv --quiet --clear --python 3.12 .venv
  .uv/uv pip install --quiet --python .venv/bin/python --constraints constraints.txt \
    "t5jax[tpu,gcs] @ file://$wheel"
  printf '%s' "$lock" >.installed
  say "installed"
}

install_all() {
  if [[ -z $IMAGE ]]; then
    install_from_lock
    return
  fi
  case $IMAGE in
    *-docker.pkg.dev/*) sudo gcloud auth configure-docker "${IMAGE%%/*}" --quiet ;;
  esac
  sudo docker pull --quiet "$IMAGE"
}

# Values go from Secret Manager into a file in memory, which only root can read.
write_secrets() {
  local line value
  sudo rm -f "$secrets"
  sudo install -m 600 /dev/null "$secrets"
  while read -r line; do
    [[ -n $line ]] || continue
    value=$(gcloud secrets versions access latest --secret="${line#*=}" --project="$PROJECT" \
      </dev/null)
    if [[ $value == *$'\n'* || $value == *[\"\\]* ]]; then
      say "secret ${line#*=} has several lines, a quotation mark or a backslash; keep it in one line"
      exit 1
    fi
    printf '%s="%s"\n' "${line%%=*}" "$value" | sudo tee -a "$secrets" >/dev/null
  done <<<"$SECRET_NAMES"
}

# A service that failed would be called failed for ever, also after it was stopped.
stop() {
  sudo systemctl stop "$unit" 2>/dev/null || true
  sudo systemctl reset-failed "$unit" 2>/dev/null || true
  sudo rm -f "$secrets"
}

start() {
  case $(state) in
    running | stopping)
      say "runs already"
      return
      ;;
  esac
  stop
  write_secrets
  mkdir -p files
  sudo systemd-run --quiet --unit="$unit" --uid="$(id -u)" --gid="$(id -g)" \
    --working-directory="$PWD/files" --setenv=HOME="$HOME" \
    --property=RemainAfterExit=yes --property=KillMode=mixed --property=TimeoutStopSec=300 \
    --property=EnvironmentFile="$secrets" \
    bash "$PWD/run.sh"
  say "started"
}

case ${1:-} in
  install) install_all ;;
  start) start ;;
  status) echo "t5jax-status $(hostname) $(state) $(property ExecMainStatus)" ;;
  log) sudo journalctl --unit="$unit" --output=cat --lines=200 --follow ;;
  tail) sudo journalctl --unit="$unit" --output=cat --lines="${2:-40}" --no-pager ;;
  stop)
    stop
    say "stopped"
    ;;
  *)
    sed -n 's/^#   //p' "$0" >&2
    exit 2
    ;;
esac
