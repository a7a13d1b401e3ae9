"""edgepack: from a Hugging Face model to a package a device can run and a release pipeline can trust."""
