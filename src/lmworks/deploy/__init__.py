"""A model folder made ready for production: images, clusters, functions, machines without a network."""
