#!/usr/bin/env bash
# Converts a container image to a .sqsh file for enroot and pyxis: containers/import.sh IMAGE FILE.sqsh
#   IMAGE  a name in a registry, as for docker pull, such as nvcr.io/nvidia/nemo:25.11;
#          dockerd://NAME, an image of the local docker daemon, such as dockerd://nemo-rao:25.11;
#          or any other source for enroot import: podman://NAME, docker://USER@REGISTRY#NAME
# The file appears under its name only when it is complete. Store passwords for registries in enroot's
# ~/.config/enroot/.credentials, with a line "machine nvcr.io login \$oauthtoken password KEY".
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

(($# == 2)) || fail "give IMAGE and FILE.sqsh, such as: containers/import.sh nvcr.io/nvidia/nemo:25.11 nemo.sqsh"
image=$1 file=$2
[[ -n "$image" && "$image" != -* ]] || fail "IMAGE '$image': give an image's name, such as nvcr.io/nvidia/nemo:25.11"
[[ "$file" == *.sqsh ]] || fail "FILE '$file': give a name that ends in .sqsh"
[[ ! -e "$file" ]] || fail "FILE '$file': exists already; delete it, or give another name"
folder=$(dirname -- "$file")
[[ -d "$folder" && -w "$folder" ]] || fail "FILE '$file': $folder is not a writable directory"
command -v enroot > /dev/null || fail "enroot is not installed here; run this on a machine that has it, such as a node of the cluster"

if [[ "$image" != *://* ]]; then
  # enroot separates the registry with a #. As for docker, the first part is a registry if it looks like a host name.
  host=${image%%/*}
  if [[ "$host" != "$image" && ("$host" == *[.:]* || "$host" == localhost) ]]; then
    image="$host#${image#*/}"
  fi
  image="docker://$image"
fi

# In the same directory, so that the final rename does not copy. enroot creates the file itself.
temporary=$(mktemp -d -- "$folder/.import.XXXXXXXX")
trap 'rm -rf -- "$temporary"' EXIT
enroot import --output "$temporary/image.sqsh" -- "$image" || fail "enroot could not import $image; see its message above"
[[ -s "$temporary/image.sqsh" ]] || fail "enroot imported $image, but wrote nothing"
mv -n -- "$temporary/image.sqsh" "$file"
echo "$file"
