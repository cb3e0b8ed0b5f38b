#!/usr/bin/env bash
# Brings the programs that some tests run for real: Debian's Prometheus, Alertmanager, Chromium and
# PostgreSQL, and buf from npm.
# What cannot be installed is named; its tests skip with that reason (or fail under --require-tools).
set -u
cd "$(dirname "$0")/.."

as_root=()
if [ "$(id -u)" -ne 0 ]; then as_root=(sudo -n); fi

packages=()
command -v prometheus >/dev/null && command -v promtool >/dev/null || packages+=(prometheus)
# Debian gives Alertmanager this name on disk as well.
command -v prometheus-alertmanager >/dev/null || packages+=(prometheus-alertmanager)
command -v chromium >/dev/null || command -v google-chrome >/dev/null || packages+=(chromium)
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || packages+=(postgresql)
[ -x .tools/node_modules/.bin/buf ] || command -v npm >/dev/null || packages+=(npm)
if [ ${#packages[@]} -gt 0 ]; then
  if command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null; then
    echo "installing ${packages[*]}"
    # The daemons must not start on their default ports: policy-rc.d answers 101, "not allowed".
    policy=/usr/sbin/policy-rc.d
    made_policy=false
    if [ ! -e "$policy" ]; then
      printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
      "${as_root[@]}" chmod +x "$policy"
      made_policy=true
    fi
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null ||
      echo "could not install ${packages[*]}"
    if $made_policy; then "${as_root[@]}" rm -f "$policy"; fi
  else
    echo "missing and not installable here (needs apt-get and root): ${packages[*]}"
  fi
fi

if [ ! -x .tools/node_modules/.bin/buf ]; then
  if command -v npm >/dev/null; then
    mkdir -p .tools
    npm install --silent --no-audit --no-fund --prefix .tools @bufbuild/buf@1.75.0 || echo "could not install buf"
  else
    echo "buf needs npm, which is missing"
  fi
fi
exit 0
