"""The keys of one host on one token: found, proved, made, signed with, retired."""
