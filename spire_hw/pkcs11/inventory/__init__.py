"""What is on a token, and whose it is: names, the manifest, generations, leftovers."""
