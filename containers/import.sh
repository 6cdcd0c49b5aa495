#!/usr/bin/env bash
# Makes a .sqsh file of a container image, for enroot and pyxis: containers/import.sh IMAGE FILE.sqsh
#   IMAGE  a name in a registry, as docker pull takes it, such as nvcr.io/nvidia/nemo:25.11;
#          dockerd://NAME, an image of this machine's docker, such as dockerd://nemo-rao:25.11;
#          or whatever else enroot import takes: podman://NAME, docker://USER@REGISTRY#NAME
# The file appears under its name once it is whole. A password for a registry is enroot's to know:
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
[[ -d "$folder" && -w "$folder" ]] || fail "FILE '$file': $folder is no folder that can be written to"
command -v enroot > /dev/null || fail "enroot is not installed here; run this where it is, on a node of the cluster"

if [[ "$image" != *://* ]]; then
  # enroot sets the registry off by a #; as for docker, the first part is one if it could be a host's name.
  host=${image%%/*}
  if [[ "$host" != "$image" && ("$host" == *[.:]* || "$host" == localhost) ]]; then
    image="$host#${image#*/}"
  fi
  image="docker://$image"
fi

# Beside the file, so that renaming it copies nothing; enroot wants to make it itself.
temporary=$(mktemp -d -- "$folder/.import.XXXXXXXX")
trap 'rm -rf -- "$temporary"' EXIT
enroot import --output "$temporary/image.sqsh" -- "$image" || fail "enroot could not import $image; its reason is above"
[[ -s "$temporary/image.sqsh" ]] || fail "enroot imported $image, but wrote nothing"
mv -n -- "$temporary/image.sqsh" "$file"
echo "$file"
