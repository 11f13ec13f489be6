"""Network classes that diffusers lacks, one self-contained file each: a saved pipeline contains a copy of them."""
