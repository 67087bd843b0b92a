// A KeyManager for the server, made with upstream's own plugin SDK: keys in memory.
// It asks for what hosts offer, prints, and panics when it is to sign with a key called "panic".
package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/spire-plugin-sdk/pluginmain"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	metricsv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/common/metrics/v1"
	agentstorev1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/agentstore/v1"
	keymanagerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/keymanager/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

type keyManager struct {
	keymanagerv1.UnimplementedKeyManagerServer
	configv1.UnimplementedConfigServer

	lock    sync.Mutex
	keys    map[string]*ecdsa.PrivateKey
	log     hclog.Logger
	metrics metricsv1.MetricsServiceClient
	agents  agentstorev1.AgentStoreServiceClient
}

func (k *keyManager) SetLogger(log hclog.Logger) { k.log = log }

func (k *keyManager) BrokerHostServices(broker pluginsdk.ServiceBroker) error {
	fmt.Println("printed on stdout")
	if !broker.BrokerClient(&k.metrics) || !broker.BrokerClient(&k.agents) {
		return status.Error(codes.FailedPrecondition, "host services are missing")
	}
	return nil
}

func (k *keyManager) Configure(
	ctx context.Context, request *configv1.ConfigureRequest,
) (*configv1.ConfigureResponse, error) {
	if strings.Contains(request.HclConfiguration, "bad") {
		return nil, status.Error(codes.InvalidArgument, "bad is bad")
	}
	id := "spiffe://" + request.CoreConfiguration.TrustDomain + "/spire/agent/x/y"
	_, err := k.agents.GetAgentInfo(ctx, &agentstorev1.GetAgentInfoRequest{AgentId: id})
	k.log.Warn("configured", "text", request.HclConfiguration, "agent", status.Code(err).String())
	_, err = k.metrics.IncrCounter(ctx, &metricsv1.IncrCounterRequest{Key: []string{"a", "b"}, Val: 1})
	return &configv1.ConfigureResponse{}, err
}

func describe(id string, key *ecdsa.PrivateKey) *keymanagerv1.PublicKey {
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		panic(err)
	}
	sum := sha256.Sum256(der)
	return &keymanagerv1.PublicKey{
		Id:          id,
		Type:        keymanagerv1.KeyType_EC_P256,
		PkixData:    der,
		Fingerprint: hex.EncodeToString(sum[:]),
	}
}

func (k *keyManager) GenerateKey(
	_ context.Context, request *keymanagerv1.GenerateKeyRequest,
) (*keymanagerv1.GenerateKeyResponse, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	k.lock.Lock()
	defer k.lock.Unlock()
	k.keys[request.KeyId] = key
	return &keymanagerv1.GenerateKeyResponse{PublicKey: describe(request.KeyId, key)}, nil
}

func (k *keyManager) GetPublicKey(
	_ context.Context, request *keymanagerv1.GetPublicKeyRequest,
) (*keymanagerv1.GetPublicKeyResponse, error) {
	k.lock.Lock()
	defer k.lock.Unlock()
	answer := &keymanagerv1.GetPublicKeyResponse{}
	if key, ok := k.keys[request.KeyId]; ok {
		answer.PublicKey = describe(request.KeyId, key)
	}
	return answer, nil
}

func (k *keyManager) GetPublicKeys(
	context.Context, *keymanagerv1.GetPublicKeysRequest,
) (*keymanagerv1.GetPublicKeysResponse, error) {
	k.lock.Lock()
	defer k.lock.Unlock()
	answer := &keymanagerv1.GetPublicKeysResponse{}
	for id, key := range k.keys {
		answer.PublicKeys = append(answer.PublicKeys, describe(id, key))
	}
	return answer, nil
}

func (k *keyManager) SignData(
	_ context.Context, request *keymanagerv1.SignDataRequest,
) (*keymanagerv1.SignDataResponse, error) {
	if request.KeyId == "panic" {
		fmt.Fprintln(os.Stderr, "about to panic")
		panic("as asked")
	}
	k.lock.Lock()
	key, ok := k.keys[request.KeyId]
	k.lock.Unlock()
	if !ok {
		return nil, status.Error(codes.NotFound, "no such key")
	}
	signature, err := key.Sign(rand.Reader, request.Data, crypto.SHA256)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	fingerprint := describe(request.KeyId, key).Fingerprint
	return &keymanagerv1.SignDataResponse{Signature: signature, KeyFingerprint: fingerprint}, nil
}

func main() {
	plugin := &keyManager{keys: map[string]*ecdsa.PrivateKey{}}
	pluginmain.Serve(
		keymanagerv1.KeyManagerPluginServer(plugin),
		configv1.ConfigServiceServer(plugin),
	)
}
