#!/bin/sh
# Creates MLflow's account, which is no superuser, and its database, at the first start of PostgreSQL.
# Afterwards the superuser has no password, so that nobody can log in as it over the network.
set -eu
psql --set=ON_ERROR_STOP=1 --username=postgres <<'SQL'
\set password `cat /run/secrets/postgres_password`
CREATE ROLE mlflow LOGIN CREATEDB PASSWORD :'password';
CREATE DATABASE mlflow OWNER mlflow;
ALTER ROLE CURRENT_USER PASSWORD NULL;
SQL
