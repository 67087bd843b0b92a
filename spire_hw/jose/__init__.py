"""JOSE: key sets and compact signatures."""
